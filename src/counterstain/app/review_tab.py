"""The tab that reviews a synthetic set: a grid of its patches, and keys that accept and reject them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd
from PIL import Image

from counterstain.api.drawing import instance_table
from counterstain.api.readings import judged_by
from counterstain.app.server import CACHE, Studio, caption, handled, legend, person_of, picture
from counterstain.data.overlays import cut_again, enlarged, outlined
from counterstain.data.review import DECISIONS, UNDECIDED, Review
from counterstain.progress import steps_heard

ANY = "any"
JUDGED = {"looks as asked": True, "looks different": False}
PAGE = 24  # patches in the grid
SHOWN_PX = 512
MARKS = {"accept": "✓", "reject": "✗", "unsure": "?", UNDECIDED: ""}
KEYS = {"accept": "a", "reject": "r", "unsure": "u"}


@dataclass(frozen=True, kw_only=True)
class View:
    """Which patches one browser tab goes through, and which of them it is at."""

    indices: tuple[int, ...]
    place: int = 0

    @property
    def index(self) -> int | None:
        """Number of the patch in the set."""
        return self.indices[self.place] if self.indices else None


class Tab:
    """The parts of the tab and what they do; everything that differs between users is in a :class:`View`."""

    def __init__(self, studio: Studio, blocks: gr.Blocks, person: gr.Textbox) -> None:
        assert studio.patches is not None
        self.studio, self.patches, self.person = studio, studio.patches, person
        judged = None if studio.judge is None else judged_by(studio.judge, self.patches)
        self.known = Review(self.patches, audit=studio.audit, judged=judged)
        self.is_own = self.patches.header.cohort == studio.cohort.fingerprint
        self.file_of = lru_cache(4096)(self._written)
        self.view = gr.State(None)
        self.seen = gr.Number(visible=False, precision=0)  # the patch that the browser shows, which a key is about
        gr.HTML(legend(self.patches.header.taxonomy))
        with gr.Row():
            self.subtype = gr.Dropdown([ANY, *self.patches.header.taxonomy.names], value=ANY, label="Shows subtype")
            slides = sorted(self.patches.patches["slide"].unique())
            self.slide = gr.Dropdown([ANY, *slides], value=ANY, label="Mask from slide")
            methods = sorted(set(self.known.methods))
            self.method = gr.Dropdown([ANY, *methods], value=ANY, label="Drawn by", visible=len(methods) > 1)
            has_judge = judged is not None or not self.patches.judged.empty
            self.judged = gr.Dropdown([ANY, *JUDGED], value=ANY, label="To the judge", visible=has_judge)
            decisions = [UNDECIDED, ANY, *DECISIONS]
            self.decision = gr.Dropdown(decisions, value=UNDECIDED, label="Decision", elem_id="decision")
        self.progress = gr.HTML("", elem_id="review-progress")
        with gr.Row():
            with gr.Column(scale=5, min_width=360):
                caption("Patches: choose one, or go on with the keys")
                self.grid = gr.Gallery(
                    show_label=False, columns=6, allow_preview=False, interactive=False, buttons=[], elem_id="grid",
                    object_fit="contain", height="auto",
                )  # fmt: skip
                with gr.Row():
                    self.back = gr.Button("Previous patch", size="sm", min_width=80)
                    self.on = gr.Button("Next patch", size="sm", min_width=80)
            with gr.Column(scale=4, min_width=360):
                with gr.Row():
                    with gr.Column(min_width=160):
                        self.drawn = picture("Drawn", elem_id="drawn-patch")
                    with gr.Column(min_width=160, visible=self.is_own):
                        self.real = picture("Real tissue", elem_id="real-patch")
                self.about = gr.HTML("", elem_id="about-patch")
                with gr.Row():
                    self.buttons = {
                        decision: gr.Button(
                            f"{decision.capitalize()} ({key})", size="md", min_width=90, elem_id=f"key-{key}"
                        )
                        for decision, key in KEYS.items()
                    }
                self.undo = gr.Button("Undo my last decision (z)", size="sm", elem_id="key-z")
        self._connect(blocks)

    def _connect(self, blocks: gr.Blocks) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        filters = [self.subtype, self.slide, self.method, self.judged, self.decision]
        shown = [self.view, self.seen, self.grid, self.drawn, self.real, self.about, self.progress]
        deciding = private | {"concurrency_id": "deciding", "concurrency_limit": 1}  # in the order of the keys
        blocks.load(handled(self.filtered), filters, shown, **private)
        for part in filters:
            hears = (
                private | {"show_progress": "full", "show_progress_on": [self.progress]}
                if part is self.judged
                else private
            )
            part.input(handled(self.filtered), filters, shown, **hears)
        self.grid.select(handled(self.chosen), self.view, shown, **private)
        self.back.click(handled(lambda view: self.filled(_moved(view, -1))), self.view, shown, **private)
        self.on.click(handled(lambda view: self.filled(_moved(view, 1))), self.view, shown, **private)
        for decision, button in self.buttons.items():
            button.click(handled(self._decides(decision)), [self.view, self.seen, self.person], shown, **deciding)
        self.undo.click(handled(self.undone), [self.view, self.person], shown, **deciding)

    def filtered(  # noqa: PLR0917 - in the order of the controls
        self,
        subtype: str,
        slide: str,
        method: str,
        judged: str,
        decision: str,
        progress: Any = gr.Progress(),  # noqa: B008 - this is how Gradio hands it over
    ) -> list[Any]:
        """Show the patches that fit."""
        with steps_heard(lambda done, total: progress((done, total), desc="judging", unit="patches")):
            found = self.known.select(
                subtype=None if subtype == ANY else subtype,
                slide=None if slide == ANY else slide,
                method=None if method == ANY else method,
                agreed=JUDGED.get(judged),
                decision=None if decision == ANY else decision,
            )
        return self.filled(View(indices=tuple(found)))

    def chosen(self, view: View, event: gr.SelectData) -> list[Any]:
        """Go to a patch of the grid."""
        place = view.place - view.place % PAGE + int(event.index)
        return self.filled(replace(view, place=min(max(place, 0), max(len(view.indices) - 1, 0))))

    def _decides(self, decision: str) -> Any:
        def decided(view: View, seen: int, person: str, request: gr.Request) -> list[Any]:
            if view.index is None or seen != view.index:
                return self.filled(view)  # a key before the next patch was shown
            Review(self.patches, person_of(person, request)).decide(view.index, decision)
            return self.filled(_moved(view, 1))

        return decided

    def undone(self, view: View, person: str, request: gr.Request) -> list[Any]:
        """Take the last decision of this person back, and go to its patch."""
        index = Review(self.patches, person_of(person, request)).undo()
        if index in view.indices:
            view = replace(view, place=view.indices.index(index))
        return self.filled(view)

    def filled(self, view: View) -> list[Any]:
        """Fill every part with a view."""
        decisions = self.known.decisions().set_index("index")
        first = view.place - view.place % PAGE
        page = view.indices[first : first + PAGE]
        grid = [(self.file_of(i), f"{i} {MARKS[_decision(decisions, i)]}".strip()) for i in page]
        progress = f"<p>{escape(str(self.known.progress()))}; {len(view.indices)} fit the filters</p>"
        gallery = gr.Gallery(grid, selected_index=view.place - first if page else None)
        if view.index is None:
            return [view, None, gallery, None, None, "<p>No patch fits the filters.</p>", progress]
        return [view, view.index, gallery, *self._pictures(view.index), self._about(view, decisions), progress]

    def _pictures(self, index: int) -> list[np.ndarray | None]:
        patch, size = self.patches[index], self.patches.header.size_px
        factor = max(1, SHOWN_PX // size)
        shown = [patch, cut_again(self.studio.cohort, patch.source, size)] if self.is_own else [patch]
        large = [outlined(enlarged(one, factor), width_px=4, numbered=True) for one in shown]
        return [*large, *[None] * (2 - len(large))]

    def _about(self, view: View, decisions: pd.DataFrame) -> str:
        """Return what is known of a patch as HTML."""
        assert view.index is not None
        rows = self.known.patches.instances
        name_of, own = self.patches.header.taxonomy.name_of, rows[rows["index"] == view.index]
        patch, judge = self.patches[view.index], self.studio.judge
        seen = {} if judge is None else instance_table(patch, judge).set_index("instance")["judge"].dropna().to_dict()
        columns = (own[name].tolist() for name in ("instance", "subtype_before", "subtype"))
        lines = [f"Mask from region {patch.source.region}"]
        for i, before, after in zip(*columns, strict=True):
            looks = f"; the judge sees {seen[i]}" if i in seen else ""
            lines.append(f"{i}: {name_of(before)} → {name_of(after)}{looks}")
        if not pd.isna(similar := self.known.similarity.get(view.index)):
            lines.append(f"Correlation with the training tissue that it resembles most: {similar:.2f}")
        decision = _decision(decisions, view.index)
        by = f" by {decisions['reviewer'].get(view.index)!s}" if decision != UNDECIDED else ""
        where = f"Patch {view.index} ({view.place + 1} of {len(view.indices)}): {decision}{by}"
        return f"<p><b>{escape(where)}</b><br>{'<br>'.join(map(escape, lines))}</p>"

    def _written(self, index: int) -> str:
        """Write a patch for the grid where the browser may fetch it, and return the file."""
        file = Path(mkdtemp(dir=CACHE)) / "patch.png"
        Image.fromarray(self.patches[index].image).save(file)
        return str(file)


def _decision(decisions: pd.DataFrame, index: int) -> str:
    return str(decisions["decision"].get(index, UNDECIDED))


def _moved(view: View, by: int) -> View:
    return replace(view, place=min(max(view.place + by, 0), max(len(view.indices) - 1, 0)))
