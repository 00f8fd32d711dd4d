// Loaded before require.js on pages that hold ipywidgets.

// The vendored AMD modules, seen from any page. The widget manager finds its fonts from here as well.
var require = { baseUrl: document.documentElement.dataset.content_root + "_static/vendor" };

// HTML and Label widgets typeset themselves through MathJax 2's queue, which MathJax 3 does not have.
if (window.MathJax) {
  const config = window.MathJax;
  const hub = { Queue: ([, , element]) => ready.then(() => window.MathJax.typesetPromise([element])) };
  const ready = new Promise((resolve) => {
    config.startup = {
      ready: () => {
        window.MathJax.startup.defaultReady();
        window.MathJax.Hub = hub;
        window.MathJax.startup.promise.then(resolve);
      },
    };
  });
  config.Hub = hub;
}
