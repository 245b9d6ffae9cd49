"""How the documentation is built: `python -m sphinx -W --keep-going -n -b html docs build/docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from spark_ray import __version__

project = "spark_ray"
copyright = "the spark_ray authors"
version = release = __version__
extensions = ["myst_parser", "sphinx_click", "generated"]
nitpicky = True
exclude_patterns = ["_ext"]
smartquotes = False  # options stay --options
toc_object_entries = False  # sections are enough beside a page of keys

myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]

html_theme = "furo"
html_title = "spark_ray"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["spark_ray.css"]
pygments_style = "friendly"
