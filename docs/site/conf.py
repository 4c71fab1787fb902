"""Sphinx's settings: Markdown by MyST, the theme furo, nothing from a network."""

from fedsim.core.home import __version__

project = "fedsim"
author = "fedsim authors"
copyright = "fedsim authors, MIT licence"
release = version = __version__
extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page that a repository shows as well may begin a level lower
html_theme = "furo"
html_title = f"fedsim {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_style, pygments_dark_style = "friendly", "github-dark"
copybutton_exclude = ".linenos, .gp, .go"
