"""Draws docs/images/house.png and writes the tables of the rooms into CONTRIBUTING.md: `python docs/make_house.py`.

What is drawn is in the picture's own metadata, too, where a test reads it.
"""

import ast
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "house.png"
GUIDE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- rooms: written by docs/make_house.py -->\n", "<!-- end -->\n"
COLUMNS = (("data_pipeline", "launch"), ("model", "pretrain"))
"""Packages that stand on one another in the picture, from below; left of them others do."""
WIDTHS = (4.5, 6.3)
"""Of the columns."""
COLOURS = {"data_pipeline": "#2f6f4f", "model": "#9a5b00", "pretrain": "#2457a6", "launch": "#8a2d62"}
WIDTH, HEIGHT, ROW, HEAD = 1.15, 0.42, 0.82, 0.45
"""Of a box; from row to row; and of a package's name."""
INK = "#1f2328"
LEGEND = (
    "An arrow goes from a room to one of its package that it imports; what follows from other arrows is left out.",
    "A dot: it imports from the package of that colour, too. White: a single file.",
)


def house() -> dict[str, list[str]]:
    """Every room, and every file that stands in none, with what it imports of the others: {"model.layers": […], …}."""
    found: dict[str, set[str]] = {}
    for package in COLOURS:
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "__init__.py":
                room = ".".join(file.relative_to(ROOT).with_suffix("").parts[:2])
                found.setdefault(room, set()).update(_imports(file))
    return {room: sorted(found[room] & found.keys() - {room}) for room in sorted(found)}


def tables() -> str:
    """What each package, each room and each file that stands in none owns, as its docstring says, by package."""
    lines = []
    for package in COLOURS:
        lines += ["", f"**{package}**: {_owns(ROOT / package / '__init__.py')}", "", "| | |", "|---|---|"]
        for place in (room for room in house() if room.startswith(f"{package}.")):
            path = ROOT / place.replace(".", "/")
            name, text = (f"{path.name}/", path / "__init__.py") if path.is_dir() else (f"{path.name}.py", None)
            lines.append(f"| `{package}/{name}` | {_owns(text or path.with_suffix('.py'))} |")
    return "\n".join(lines) + "\n\n"


def _owns(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (".".join(name.split(".")[:2]) for name in names)


class Drawing:
    """Each package as storeys: what a room imports of its package lies below it."""

    def __init__(self, imports: dict[str, list[str]]) -> None:
        self.imports = imports
        self.boxes: dict[str, tuple[float, float]] = {}
        """Centres."""
        self.frames: dict[str, tuple[float, float, float, float]] = {}
        """Left, below, width, height."""
        left = 0.0
        for packages, width in zip(COLUMNS, WIDTHS, strict=True):
            below = 0.0
            for package in packages:
                below = self._place(package, left, below, width)
            left += width + 0.25
        self.size = left - 0.25, below

    def figure(self) -> Figure:
        """All of it."""
        width, height = self.size[0] + 0.2, self.size[1] + 0.55
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-0.1, width - 0.1)
        axes.set_ylim(-0.6, height - 0.6)
        axes.axis("off")
        for package in self.frames:
            self._frame(axes, package)
        for room in self.imports:
            for other in self._drawn(room):
                self._arrow(axes, room, other)
        for room in self.imports:
            self._box(axes, room)
        for number, line in enumerate(LEGEND):
            axes.text(0.0, -0.18 - 0.22 * number, line, fontsize=10, color=INK, va="center")
        return figure

    def _inside(self, room: str) -> list[str]:
        return [other for other in self.imports[room] if other.split(".")[0] == room.split(".")[0]]

    def _storeys(self, package: str) -> list[list[str]]:
        @cache
        def storey(room: str) -> int:
            return 1 + max(map(storey, self._inside(room)), default=-1)

        rooms = [room for room in self.imports if room.startswith(f"{package}.")]
        return [[room for room in rooms if storey(room) == number] for number in range(1 + max(map(storey, rooms)))]

    def _drawn(self, room: str) -> list[str]:
        """What it imports of its package and no other room that it imports does."""

        @cache
        def below(one: str) -> frozenset[str]:
            inside = self._inside(one)
            return frozenset(inside).union(*map(below, inside))

        inside = self._inside(room)
        return [one for one in inside if not any(one in below(other) for other in inside)]

    def _place(self, package: str, left: float, below: float, width: float) -> float:
        """Its frame and its rooms, each row ordered by what it stands on. Returns where the next begins."""

        def over(room: str) -> float:
            found = [self.boxes[other][0] for other in self._drawn(room)]
            return sum(found) / len(found) if found else 0.0

        storeys = self._storeys(package)
        for number, rooms in enumerate(storeys):
            step = width / len(rooms)
            for place, room in enumerate(sorted(rooms, key=over)):
                self.boxes[room] = left + step * (place + 0.5), below + (number + 0.5) * ROW
        height = len(storeys) * ROW + HEAD
        self.frames[package] = left, below, width, height
        return below + height + 0.2

    def _frame(self, axes: Axes, package: str) -> None:
        left, below, width, height = self.frames[package]
        frame = FancyBboxPatch(
            (left, below),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=COLOURS[package] + "14",
            edgecolor=COLOURS[package],
            linewidth=1.2,
        )
        axes.add_patch(frame)
        name = f"{package}/"
        axes.text(
            left + 0.12, below + height - 0.25, name, fontsize=14, weight="bold", color=COLOURS[package], va="center"
        )

    def _box(self, axes: Axes, room: str) -> None:
        package, name = room.split(".")
        x, y = self.boxes[room]
        file = (ROOT / package / f"{name}.py").is_file()
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor="#ffffff" if file else COLOURS[package],
            edgecolor=COLOURS[package],
            linewidth=1.0,
            zorder=3,
        )
        axes.add_patch(box)
        shown = f"{name}.py" if file else name
        axes.text(x, y + 0.05, shown, fontsize=10, ha="center", va="center", color=INK if file else "#ffffff", zorder=4)
        beyond = sorted({other.split(".")[0] for other in self.imports[room]} - {package})
        for number, other in enumerate(beyond):
            axes.plot(
                [x + (number - (len(beyond) - 1) / 2) * 0.14],
                [y - 0.13],
                marker="o",
                markersize=5.5,
                color=COLOURS[other],
                markeredgecolor="#ffffff",
                markeredgewidth=0.8,
                zorder=5,
            )

    def _arrow(self, axes: Axes, room: str, other: str) -> None:
        (x, y), (to_x, to_y) = self.boxes[room], self.boxes[other]
        axes.add_patch(
            FancyArrowPatch(
                (x, y - HEIGHT / 2),
                (to_x, to_y + HEIGHT / 2),
                arrowstyle="-|>",
                mutation_scale=9,
                linewidth=0.9,
                color=COLOURS[room.split(".")[0]],
                alpha=0.75,
                shrinkA=0,
                shrinkB=1,
                zorder=2,
            )
        )


def main() -> None:
    """Writes picture and tables."""
    imports = house()
    about = {"Software": None, "Description": json.dumps(imports)}
    Drawing(imports).figure().savefig(PICTURE, dpi=110, facecolor="#ffffff", metadata=about)
    before, rest = GUIDE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    GUIDE.write_text(f"{before}{BEGIN}{tables()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
