"""Sphinx configuration; run it through ``book/build.py``, which lays out the source tree and vendors the JavaScript."""

import sys
from pathlib import Path

BOOK = Path(__file__).parent
sys.path.insert(0, str(BOOK))

project = "dsv4ref"
author = "the dsv4ref authors"
project_copyright = f"{author}, Apache-2.0"
html_title = "dsv4ref: DeepSeek-V4 inference on AMD Instinct, one optimisation at a time"
language = "en"

extensions = [
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_exercise",
    "sphinxcontrib.bibtex",
    "bookkit.pages",
]
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"

# Pages and notebooks are MyST.
myst_enable_extensions = [
    "amsmath",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
    "html_image",
    "substitution",
]
myst_heading_anchors = 3

# Chapters are executed, and executed once: the cache outlives the build (build.py drops it when the code changes).
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_render_markdown_format = "myst"  # links to notebooks in Markdown outputs resolve like those in cells
# Progress bars draw on stderr; an error is an exception and fails the build whatever is shown here.
nb_output_stderr = "remove"

# Everything the pages load is served from _static: the site opens from file:// with no network.
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["names.js", "sort.js"]
mathjax_path = "vendor/mathjax/es5/tex-svg.js"
mathjax3_config = {
    # The menu loads further parts of MathJax on demand, which are not vendored.
    "options": {"enableMenu": False},
    # An unknown macro is an error that the site check finds, not a word in red.
    "tex": {"packages": {"[-]": ["noundefined"]}},
}
nb_ipywidgets_js = {
    "widgets.js": {},
    "vendor/requirejs/require.js": {},
    # Widgets beyond ipywidgets' own would be asked for from a CDN; this points that request at the site itself.
    "vendor/@jupyter-widgets/html-manager/dist/embed-amd.js": {"data-jupyter-widgets-cdn": "not-vendored/"},
}

html_theme = "sphinx_book_theme"
html_theme_options = {
    "logo": {"text": "dsv4ref"},
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": True,
    "navigation_with_keys": False,
    "navbar_persistent": [],
    "article_header_end": ["article-header-buttons"],
}
html_context = {"default_mode": "auto"}
html_sourcelink_suffix = ""
# Result summaries are fetched from the pages, which a browser refuses on file://.
html_show_search_summary = False
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
