// Names for controls that come without one, so that a screen reader has something to say.

function nameControls() {
  // The theme's search button says "Search" and its shortcut; a label with other words would hide them.
  for (const button of document.querySelectorAll("button.search-button-field[aria-label]")) {
    button.removeAttribute("aria-label");
  }
  // The arrow that unfolds a page of the sidebar has no text; it belongs to the link before it.
  for (const fold of document.querySelectorAll(".has-children > details > summary:not([aria-label])")) {
    fold.setAttribute("aria-label", `Pages under ${fold.closest(".has-children").querySelector("a").textContent.trim()}`);
  }
  // The handle of an ipywidgets slider has no name; the text beside it is what it sets.
  for (const handle of document.querySelectorAll('.widget-slider [role="slider"]:not([aria-label])')) {
    const label = handle.closest(".widget-slider").querySelector(".widget-label")?.textContent.trim();
    if (label) handle.setAttribute("aria-label", label);
  }
}

document.addEventListener("DOMContentLoaded", () => {
  nameControls();
  // Widgets are drawn long after the page.
  new MutationObserver(nameControls).observe(document.body, { childList: true, subtree: true });
});
