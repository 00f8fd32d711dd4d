// Run in every page that the browser check opens: what the page promises, and what it shows.
window.bookProbe = {
  // Everything that is drawn after loading has been drawn.
  settle: async () => {
    if (window.MathJax && window.MathJax.startup) await window.MathJax.startup.promise;
    for (const image of document.querySelectorAll("main img")) {
      image.loading = "eager";
      await image.decode().catch(() => {}); // an image that does not decode has no natural width, see counts
    }
  },

  counts: () => {
    const all = (selector) => [...document.querySelectorAll(selector)];
    const visible = (element) => element.checkVisibility() && element.getBoundingClientRect().width > 0;
    // A formula in a collapsed <details> has no size, and is drawn all the same.
    const drawn = (element) => element.querySelector("mjx-container svg") !== null;
    const errors = "[data-mjx-error], mjx-merror, .widget-error, .jupyter-widgets.jupyter-error";
    return {
      formulas: all(".math").length,
      drawn: all(".math").filter(drawn).length,
      errors: all(errors).map((element) => element.textContent.slice(0, 80)),
      images: all("main img").map((element) => [element.getAttribute("src").slice(0, 80), element.naturalWidth]),
      blocks: all("div.highlight pre").length,
      copy: all("div.highlight button.copybtn").length,
      views: all('script[type="application/vnd.jupyter.widget-view+json"]').length,
      widgets: all(".jupyter-widgets").filter((element) => !element.parentElement.closest(".jupyter-widgets")).length,
      handles: all(".noUi-handle").filter(visible).length,
      unnamed: bookProbe.unnamed(),
      title: all("h1").map((element) => element.firstChild.textContent)[0] || "",
    };
  },

  // The lowest contrast of any text of the page against what it stands on (WCAG 2 relative luminance). Text of drawings
  // counts where it takes the page's colour; where it brings its own, it stands on a shape of the drawing.
  contrast: (scope = "main") => {
    const channels = (text) => (text.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
    const linear = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const light = (color) => {
      const [r, g, b] = color.map((value) => linear(value / 255));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = (element) => {
      for (let at = element; at; at = at.parentElement) {
        const color = channels(getComputedStyle(at).backgroundColor);
        if (color.length < 4 || color[3] > 0.5) return color;
      }
      return [255, 255, 255];
    };
    const texts = ["p", "li", "td", "th", "pre", "dt", "summary", "h1", "h2", "h3", ".widget-label", ".widget-readout"];
    texts.push("figcaption", "caption", "svg text:not([fill])");
    let worst = { ratio: Infinity, text: "" };
    for (const element of document.querySelectorAll(texts.map((text) => `${scope} ${text}`).join(", "))) {
      if (!element.checkVisibility() || !element.textContent.trim()) continue;
      const style = getComputedStyle(element);
      const front = light(channels(element instanceof SVGElement ? style.fill : style.color));
      const back = light(background(element));
      const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
      if (ratio < worst.ratio) worst = { ratio, text: element.textContent.trim().slice(0, 60) };
    }
    return worst;
  },

  // Pictures of the text that say nothing to somebody who does not see them. Formulas speak for themselves, and a path
  // or a bare "image" is what tools put where nobody wrote a description.
  unnamed: () => {
    const pictures = [...document.querySelectorAll("article img, article svg, article canvas")];
    const own = "mjx-container, button, .noUi-target, .sd-octicon, [aria-hidden=true], [role=presentation]";
    const name = (element) => {
      const inside = element.querySelector(":scope > title");
      return element.getAttribute("alt") || element.getAttribute("aria-label") || (inside && inside.textContent) || "";
    };
    const empty = (text) => !/\s/.test(text.trim()) || /\.(png|svg|jpe?g)$/i.test(text.trim());
    return pictures
      .filter((element) => !element.closest(own) && !element.parentElement.closest("svg") && empty(name(element)))
      .map((element) => element.outerHTML.slice(0, 80));
  },

  // What sticks out to the right of the window, other than in boxes that scroll by themselves.
  overflow: () => {
    const edge = document.documentElement.clientWidth;
    const scrolls = (element) => {
      for (let at = element; at && at !== document.body; at = at.parentElement) {
        const style = getComputedStyle(at);
        // A collapsed label is read, not seen; what is moved off the page on purpose is drawn when it is wanted.
        if (style.position === "fixed" || ["auto", "scroll", "hidden", "clip"].includes(style.overflowX)) return true;
      }
      return false;
    };
    const wide = [...document.querySelectorAll("article *")].filter(
      (element) => element.checkVisibility() && element.getBoundingClientRect().right > edge + 1 && !scrolls(element),
    );
    const outer = wide.filter((element) => !wide.includes(element.parentElement));
    return {
      page: document.documentElement.scrollWidth - edge,
      elements: outer.map((element) => `<${element.tagName.toLowerCase()}> ${element.textContent.trim().slice(0, 60)}`),
    };
  },

  // What a frames panel shows now, one line per panel.
  frames: () =>
    [...document.querySelectorAll(".dsv4-frames")].map((panel) =>
      [...panel.querySelectorAll(".dsv4-frame")].filter((f) => f.checkVisibility()).map((f) => f.dataset.label).join("|"),
    ),
};
