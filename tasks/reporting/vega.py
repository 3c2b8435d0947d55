"""Draws Vega-Lite charts as PNG and SVG, and writes a template page for `dvc plots` that works offline.

`python -m tasks.reporting.vega PAGE` writes the page. It contains Vega's code, which DVC's default page loads from a
server.
"""

import argparse
import re
from pathlib import Path

import vl_convert

VERSION = "5.20"  # of Vega-Lite; DVC's plots need version 5

PAGE = """<!DOCTYPE html>
<html>
<head>
  <meta charset="utf-8">
  {refresh_tag}
  <title>Plots of the pipeline</title>
  <script>%s</script>
  <script>
    // The menu's link to an editor elsewhere is left out.
    const embed = window.vegaEmbed;
    window.vegaEmbed = (element, spec) => embed(element, spec, {actions: {export: true, source: true}});
  </script>
  <style>body {font: 14px sans-serif; margin: 2em} .vega-embed {margin-bottom: 2em}</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def to_png(chart: str) -> bytes:
    """Draw a chart (Vega-Lite JSON) as PNG with two pixels per unit, for screens with a high resolution."""
    return vl_convert.vegalite_to_png(chart, scale=2)


def to_svg(chart: str) -> str:
    """Draw a chart (Vega-Lite JSON) as SVG. The same chart always gives the same text."""
    svg = vl_convert.vegalite_to_svg(chart)
    # The library numbers these names on from chart to chart. Number them from 0 in every chart.
    names = dict.fromkeys(re.findall(r"\b(?:clip|gradient_)\d+\b", svg))
    new_names = {name: re.sub(r"\d+", str(i), name) for i, name in enumerate(names)}
    return re.sub(r"\b(?:clip|gradient_)\d+\b", lambda found: new_names[found[0]], svg)


def plots_page() -> str:
    """The text of DVC's `plots.html_template`, with all code that plots need."""
    code = vl_convert.javascript_bundle(vl_version=VERSION)
    assert "</script" not in code and "{plot_divs}" not in code
    return PAGE.replace("%s", code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="the file to write")
    path = parser.parse_args().page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plots_page())


if __name__ == "__main__":
    main()
