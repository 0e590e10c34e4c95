"""A plot as inline SVG: what matplotlib draws, made small, with colours that follow the page.

Every colour becomes a CSS variable, so that one drawing serves a light and a dark page; text stays
text in the page's font. No outside reference is left, and no id that differs from plot to plot.
"""

import io
import re
from xml.etree import ElementTree

from jaxtrain.report.page.plots import MARGIN, Plot
from jaxtrain.report.page.style import LIGHT

_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_VARIABLES = {color: f"var(--{name})" for name, color in LIGHT.items()}
_COLOR = re.compile("|".join(_VARIABLES))
_LONG_NUMBER = re.compile(r"-?\d+\.\d\d+")
_FONT_FAMILY = re.compile(r" *font-family:[^;]*;")
_GEOMETRY = ("d", "x", "y", "width", "height")


def inline_svg(plot: Plot) -> str:
    """The plot as an `<svg>` element.

    Each of the plot's points that has a note becomes a circle that shows itself and the note under
    the pointer.
    """
    file = io.BytesIO()
    plot.figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    root = ElementTree.fromstring(file.getvalue())
    root.remove(root[0])  # matplotlib's style sheet, which would hold for the whole page
    for node in root.iter():
        _simplify(node)
    # Without the margin at the left the plot stands in line with the text of the page.
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    view = f"{MARGIN} 0 {width - MARGIN:g} {height:g}"
    root.attrib = {"class": "chart", "role": "img", "viewBox": view}
    title = ElementTree.Element("title")
    title.text = plot.description
    root.insert(0, title)
    for x, y, color, note in plot.points:
        style = f"--c:var(--{color})"
        at = {"class": "point", "style": style, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "5"}
        ElementTree.SubElement(ElementTree.SubElement(root, "circle", at), "title").text = note
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(node: ElementTree.Element) -> None:
    """Takes from one element what a page doesn't need: namespaces, white space, digits, ids that
    nothing refers to."""
    node.tag = node.tag.rpartition("}")[2]
    node.tail = None
    if node.tag != "text":
        node.text = None
    found = {name.rpartition("}")[2]: value for name, value in node.attrib.items()}
    if node.tag == "g":
        found.pop("id", None)
    if found.get("transform", "").startswith("rotate(-0 "):
        del found["transform"]
    for name in _GEOMETRY:
        if name in found:
            short = _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.1f}", found[name])
            found[name] = " ".join(short.split())
    if "style" in found:
        style = _FONT_FAMILY.sub("", found["style"])
        found["style"] = _COLOR.sub(lambda match: _VARIABLES[match[0]], style)
    node.attrib = found
