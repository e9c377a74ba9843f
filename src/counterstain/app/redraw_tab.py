"""The tab that redraws: choose a slide, a patch and instances, and see them drawn as another subtype."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd

from counterstain.api.drawing import add_to_set, instance_table
from counterstain.app.server import CACHE, Studio, caption, clicked, handled, legend, picture, table_of
from counterstain.data.overlays import enlarged, outlined, outlined_region
from counterstain.data.patches import Patch
from counterstain.errors import InputError
from counterstain.progress import steps_heard
from counterstain.synthesis.by_hand import Redrawing
from counterstain.taxonomy import IGNORE

THUMBNAIL_PX = 640
SHOWN_PX = 768  # patches are enlarged to about this, so that outlines are thin
NO_STYLE = "none"
MOST_LISTED = 200  # instances of a region
MOST_GUIDANCE = 5
MOST_SEED = 2**53 - 1  # browsers hold no larger whole numbers exactly
ROOM = 0.8  # share of a patch that the first instance shown takes at most


@dataclass(frozen=True, kw_only=True)
class View:
    """What one browser tab looks at."""

    position: int
    y_px: int
    x_px: int
    work: Redrawing
    chosen: tuple[int, ...] = ()


class Tab:
    """The parts of the tab and what they do; everything that differs between users is in a :class:`View`."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.cohort = studio, studio.cohort
        self.factor = max(1, SHOWN_PX // studio.size_px)
        regions = self.cohort.regions
        fit = regions[["height_px", "width_px"]].min(axis=1) >= studio.size_px
        self.positions: dict[str, list[int]] = {}
        for position in np.flatnonzero(fit.to_numpy()).tolist():
            self.positions.setdefault(str(regions["slide"].iloc[position]), []).append(position)
        self.view = gr.State(None)
        gr.HTML(legend(self.cohort.taxonomy))
        with gr.Row():
            with gr.Column(scale=3, min_width=260):
                self._lay_out_places()
            with gr.Column(scale=8, min_width=600), gr.Row():
                with gr.Column(scale=5, min_width=300):
                    self.picture = picture("Patch: click instances to choose them", pickable=True, elem_id="patch")
                    self.instances = gr.CheckboxGroup([], label="Chosen instances", elem_id="instances")
                    self.every = gr.Button("Choose all instances", size="sm")
                with gr.Column(scale=4, min_width=340):
                    self._lay_out_controls()
        self._lay_out_results()

    def _lay_out_places(self) -> None:
        first = self._first_slide()
        with gr.Row():
            with gr.Column(min_width=240):
                self.slide = gr.Dropdown(list(self.positions), value=first, label="Slide")
                self.region = gr.Dropdown(self._regions_of(first), label="Region")
                self.place = gr.Dropdown([], label="Instance to go to")
            with gr.Column(min_width=240):
                self.thumbnail = picture("Or click where to cut out the patch", pickable=True, elem_id="region")

    def _lay_out_controls(self) -> None:
        taxonomy, ways = self.cohort.taxonomy, self.studio.ways
        highest = taxonomy.name_of(taxonomy.counted_ids[-1] if taxonomy.counted_ids else len(taxonomy.names))
        styles = any(way.styles for way in ways.values())
        guided = any(way.guidance is not None for way in ways.values())
        self.subtype = gr.Radio(list(taxonomy.names), value=highest, label="New subtype", elem_id="subtype")
        self.way = gr.Dropdown(list(ways), value=_first_way(self.studio), label="Draw with", info=self.studio.unfit)
        self.seed = gr.Number(0, label="Seed (another number, another image)")
        self.guidance = gr.Number(1.0, label="Guidance (1 = none)", step=0.1, visible=guided)
        self.style = gr.Dropdown([NO_STYLE], value=NO_STYLE, label="Style of slide", visible=styles)
        self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Row():
            self.undo = gr.Button("Undo", size="sm", min_width=80, elem_id="undo")
            self.reset = gr.Button("Start over", size="sm", min_width=80)

    def _lay_out_results(self) -> None:
        with gr.Row(elem_classes="equal wide"):
            with gr.Column(min_width=160):
                self.original = picture("Original", elem_id="original")
            with gr.Column(min_width=160):
                self.mask = picture("Mask now", elem_id="mask")
            with gr.Column(min_width=160):
                self.result = picture("Result", elem_id="result")
            with gr.Column(min_width=160):
                caption("Original (left) over result (right)")
                self.slider = gr.ImageSlider(
                    show_label=False, format="png", interactive=False, buttons=["fullscreen"], elem_classes="tissue",
                    max_height=SHOWN_PX,
                )  # fmt: skip
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                self.table = gr.HTML("", elem_id="before-after", elem_classes="table")
            with gr.Column(scale=4, min_width=300):
                self.said = gr.HTML("", elem_id="said")
                with gr.Row():
                    self.save = gr.DownloadButton("Save as PNG", size="md", min_width=130)
                    self.keep = gr.Button(
                        "Add to the set", size="md", visible=self.studio.keep_in is not None, min_width=130
                    )

    @property
    def shown(self) -> list[Any]:
        """The parts that a view fills."""
        return [
            self.view, self.thumbnail, self.place, self.picture, self.instances, self.original, self.mask, self.result,
            self.slider, self.table, self.save, self.said,
        ]  # fmt: skip

    def connect(self, blocks: gr.Blocks) -> None:
        """Say what happens on each event."""
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        blocks.load(handled(self.opened), None, self.shown, **private)
        self.slide.input(self.slide_changed, self.slide, self.region, **private).then(
            handled(self.region_changed), self.region, self.shown, **private
        )
        self.region.input(handled(self.region_changed), self.region, self.shown, **private)
        self.thumbnail.select(handled(self.place_clicked), self.view, self.shown, **private)
        self.place.input(handled(self.place_chosen), [self.view, self.place], self.shown, **private)
        chosen = [self.view, self.picture, self.instances]
        self.picture.select(handled(self.instance_clicked), self.view, chosen, **private)
        self.instances.input(handled(self.instances_chosen), [self.view, self.instances], chosen, **private)
        self.every.click(handled(self.all_chosen), self.view, chosen, **private)
        drawing = [self.view, self.subtype, self.way, self.seed, self.guidance, self.style]
        self.draw.click(
            handled(self.drawn), drawing, self.shown, api_visibility="private", concurrency_id="drawing",
            show_progress_on=[self.picture],
        )  # fmt: skip
        self.undo.click(
            handled(lambda view: self.filled(replace(view, work=view.work.undone()))), self.view, self.shown, **private
        )
        again = handled(lambda view: self.filled(replace(view, work=Redrawing(real=view.work.real))))
        self.reset.click(again, self.view, self.shown, **private)
        self.way.input(self.way_chosen, self.way, [self.guidance, self.style], **private)
        blocks.load(self.way_chosen, self.way, [self.guidance, self.style], **private)
        self.keep.click(handled(self.kept), self.view, self.said, concurrency_id="keeping", **private)

    # What happens

    def opened(self) -> list[Any]:
        """Show the first region."""
        return self.filled(self._at_largest(self.positions[self._first_slide()][0]), region=True)

    def slide_changed(self, slide: str) -> Any:
        """List the regions of a slide."""
        choices = self._regions_of(slide)
        return gr.Dropdown(choices, value=choices[0][1])

    def region_changed(self, position: int) -> list[Any]:
        """Show a region and the patch around its largest instance."""
        return self.filled(self._at_largest(self._known(position)), region=True)

    def place_clicked(self, view: View, event: gr.SelectData) -> list[Any]:
        """Cut out the patch around a place of the region."""
        height, width = self._size(view.position)
        scale = max(height, width) / min(THUMBNAIL_PX, max(height, width))
        x, y = (float(value) * scale for value in event.index)
        return self.filled(self._at(view.position, y, x))

    def place_chosen(self, view: View, instance: int | None) -> list[Any]:
        """Cut out the patch around an instance of the region; stay where the list was left without a choice."""
        if instance is None:  # what was chosen meanwhile stays chosen, too
            return [gr.skip()] * len(self.shown)
        return self.filled(self._at(view.position, *self._centre(view.position, int(instance))))

    def instance_clicked(self, view: View, event: gr.SelectData) -> list[Any]:
        """Choose an instance, or no longer."""
        patch = view.work.patch
        y, x = clicked(event, enlarged(patch, self.factor).image)
        instance = int(patch.instances[y // self.factor, x // self.factor])
        if instance not in _drawable(patch):
            return self._chosen(view, view.chosen)
        return self._chosen(view, tuple(sorted({*view.chosen} ^ {instance})))

    def instances_chosen(self, view: View, instances: list[int]) -> list[Any]:
        """Choose the instances of a list."""
        return self._chosen(view, tuple(sorted({*instances} & {*_drawable(view.work.patch)})))

    def all_chosen(self, view: View) -> list[Any]:
        """Choose every instance of the patch."""
        return self._chosen(view, tuple(_drawable(view.work.patch)))

    def way_chosen(self, name: str) -> list[Any]:
        """Show which controls a way of drawing has."""
        way = self.studio.ways[name]
        guidance = gr.Number(value=way.guidance or 1.0, interactive=way.guidance is not None)
        return [guidance, gr.Dropdown([NO_STYLE, *way.styles], value=NO_STYLE, interactive=bool(way.styles))]

    def drawn(  # noqa: PLR0917 - in the order of the controls
        self,
        view: View,
        subtype: str,
        way: str,
        seed: float,
        guidance: float,
        style: str,
        progress: Any = gr.Progress(),  # noqa: B008 - this is how Gradio hands it over
    ) -> list[Any]:
        """Draw the chosen instances."""
        if not view.chosen:
            raise InputError("choose an instance first: click it in the patch, or tick it below")
        for name, value, most in (("seed", seed, MOST_SEED), ("guidance", guidance, MOST_GUIDANCE)):
            if not 0 <= (value or 0) <= most:
                raise InputError(f"{name}: expected a number of 0 to {most:,}")
        if (seed or 0) % 1:
            raise InputError(f"seed {seed:g}: expected a whole number")
        generator = self.studio.ways[way]
        progress(0.0, desc="drawing")
        with steps_heard(lambda done, total: progress((done, total), desc="drawing", unit="steps")):
            work = generator.redraw(
                view.work,
                dict.fromkeys(view.chosen, subtype),
                seed=int(seed or 0),
                guidance=guidance if generator.guidance is not None else None,
                style=style if style in generator.styles else None,
            )
        return self.filled(replace(view, work=work))

    def kept(self, view: View) -> str:
        """Add the patch to the set."""
        assert self.studio.keep_in is not None
        patches = add_to_set(view.work, self.cohort, out=self.studio.keep_in)
        many = "patches" if len(patches) > 1 else "patch"
        return f"{_said(view.work)}<p>Added: the set has {len(patches)} {many} now.</p>"

    # What is shown

    def filled(self, view: View, *, region: bool = False) -> list[Any]:
        """Fill every part with a view; the list of instances of its region only where that is new."""
        patch, real = view.work.patch, view.work.real
        listed = self._listed(view.position) if region else None
        return [
            view,
            self._thumbnail(view),
            gr.skip() if listed is None else gr.Dropdown(listed, value=None),
            *self._chosen(view, view.chosen)[1:],
            real.image,
            self.cohort.taxonomy.palette[patch.label_mask],
            patch.image,
            (real.image, patch.image),
            self._compared(view.work),
            self._saved(view),
            _said(view.work),
        ]

    def _chosen(self, view: View, chosen: tuple[int, ...]) -> list[Any]:
        view = replace(view, chosen=chosen)
        patch = view.work.patch
        names = [(f"{i}: {self.cohort.taxonomy.name_of(patch.subtypes[i])}", i) for i in _drawable(patch)]
        large = outlined(enlarged(patch, self.factor), width_px=3, marked=chosen, numbered=True)
        return [view, large, gr.CheckboxGroup(names, value=list(chosen))]

    def _thumbnail(self, view: View) -> np.ndarray:
        """Return the region with the patch framed."""
        image = outlined_region(self.cohort, view.position, THUMBNAIL_PX)
        scale = max(image.shape[:2]) / max(self._size(view.position))
        y, x, edge = (round(value * scale) for value in (view.y_px, view.x_px, self.studio.size_px))
        for colour, width in ((255, 3), (0, 2)):
            frame = np.zeros(image.shape[:2], bool)
            frame[y : y + edge, x : x + edge] = True
            frame[y + width : y + edge - width, x + width : x + edge - width] = False
            image[frame] = colour
        return image

    def _compared(self, work: Redrawing) -> str:
        """Return the instances before and after as HTML: their subtype, their stain and what the judge sees."""
        tables = [instance_table(patch, self.studio.judge) for patch in (work.real, work.patch)]
        columns = {"Subtype": [table["subtype"] for table in tables]}
        columns["DAB (optical density)"] = [table["dab"].map("{:.2f}".format) for table in tables]
        if self.studio.judge is not None:
            columns["Judge sees"] = [
                table["judge"].fillna("-") + table["probability"].map(" ({:.0%})".format, na_action="ignore").fillna("")
                for table in tables
            ]
        rows = zip(
            tables[0]["instance"].astype(str), *itertools.starmap(map, ((_change, *c) for c in columns.values())),
            strict=True,
        )  # fmt: skip
        return table_of(["Instance", *columns], rows) if len(tables[0]) else "<p>No instance is in this patch.</p>"

    def _saved(self, view: View) -> str:
        """Write the image where the browser may fetch it, and return its name."""
        source, steps = view.work.real.source, view.work.steps
        what = f"{steps[-1].method}-seed{steps[-1].seed}" if steps else "real"
        name = re.sub(r"[^\w.-]+", "_", f"{source.region}-y{source.y_px}-x{source.x_px}-{what}")[:150]
        file = Path(mkdtemp(dir=CACHE)) / f"{name}.png"
        file.write_bytes(view.work.png())
        return str(file)

    # Where a patch is

    def _regions_of(self, slide: str) -> list[tuple[str, int]]:
        regions, splits = self.cohort.regions["region"], self.cohort.regions["split"]
        return [
            (f"{regions.iloc[i]} ({splits.iloc[i]})" if pd.notna(splits.iloc[i]) else str(regions.iloc[i]), i)
            for i in self.positions.get(slide, ())
        ]

    def _first_slide(self) -> str:
        """Return the first slide of the training part, which a generator may draw for a set; the first without any."""
        splits = self.cohort.regions["split"].tolist()
        return next(
            (slide for slide, positions in self.positions.items() if splits[positions[0]] == "train"),
            next(iter(self.positions)),
        )

    def _known(self, position: int) -> int:
        if not any(position in positions for positions in self.positions.values()):
            raise InputError(f"no region {position!r}")
        return int(position)

    def _size(self, position: int) -> tuple[int, int]:
        row = self.cohort.regions.iloc[position]
        return int(row["height_px"]), int(row["width_px"])

    def _boxes(self, position: int) -> pd.DataFrame:
        region = self.cohort.regions["region"].iloc[position]
        table = self.cohort.instances[self.cohort.instances["region"] == region]
        found: pd.DataFrame = table[table["subtype"] != IGNORE].sort_values("area_px", ascending=False)
        return found

    def _listed(self, position: int) -> list[tuple[str, int]]:
        rows = self._boxes(position).head(MOST_LISTED)
        columns = (rows[name].tolist() for name in ("instance", "subtype", "area_px"))
        name_of = self.cohort.taxonomy.name_of
        return [(f"{i}: {name_of(subtype)}, {area:,} px", i) for i, subtype, area in zip(*columns, strict=True)]

    def _centre(self, position: int, instance: int) -> tuple[float, float]:
        boxes = self._boxes(position)
        boxes = boxes[boxes["instance"] == instance]
        if boxes.empty:
            raise InputError(f"no instance {instance!r} in this region")
        y0, x0, y1, x1 = boxes[["y0", "x0", "y1", "x1"]].to_numpy(float)[0]
        return (y0 + y1) / 2, (x0 + x1) / 2

    def _at_largest(self, position: int) -> View:
        """Cut out the patch around the largest instance that leaves room around it."""
        boxes = self._boxes(position)
        if boxes.empty:
            return self._at(position, 0, 0)
        edges = np.maximum(boxes["y1"] - boxes["y0"], boxes["x1"] - boxes["x0"])
        fit = boxes[edges <= ROOM * self.studio.size_px]
        chosen = boxes.iloc[-1] if fit.empty else fit.iloc[0]
        return self._at(position, *self._centre(position, int(chosen["instance"])))

    def _at(self, position: int, y: float, x: float) -> View:
        """Cut out the patch around a place, (row, column) in pixels of the region."""
        edge, size = self.studio.size_px, self._size(position)
        top, left = (min(max(round(at - edge / 2), 0), length - edge) for at, length in zip((y, x), size, strict=True))
        patch = self.cohort.patch(position, top, left, edge)
        return View(position=position, y_px=top, x_px=left, work=Redrawing(real=patch))


def _first_way(studio: Studio) -> str:
    """Return what draws first: inpainting, which keeps the rest of the patch, where it is to be had."""
    from counterstain.generators.methods import METHODS

    return next((n for n, way in studio.ways.items() if METHODS[way.drawer.method].inpaints), next(iter(studio.ways)))


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def _drawable(patch: Patch) -> list[int]:
    return sorted(instance for instance, subtype in patch.subtypes.items() if subtype != IGNORE)


def _said(work: Redrawing) -> str:
    """Return what was drawn, drawing by drawing, as HTML."""

    def lines() -> Iterator[str]:
        for step in work.steps:
            changes = "; ".join(f"{i}: {before} → {after}" for i, (before, after) in step.instances.items())
            how = f", guidance {step.guidance:g}" if step.guidance is not None else ""
            how += f", style of {step.style}" if step.style else ""
            yield f"<li>{escape(f'{changes} ({step.method}, seed {step.seed}{how})')}</li>"

    return f"<ol>{''.join(lines())}</ol>" if work.steps else "<p>Nothing was drawn yet.</p>"
