"""Discover subtypes: describe the instances of a cohort, cluster them, write the cohort with what was found.

OUT/ is a cohort with the pixels of the first one, which must stay where it is. It also holds
    instances.csv     a row per instance: region, instance, slide, patient, split, subtype, cluster, certainty, border,
                      parts, known (its subtype in the first cohort), area_px and what was measured of its stains
    clusters.csv      a row per cluster: cluster, subtype, words, instances, border, patients, area_share, means
    stability.csv     a row per number of clusters that was tried: k, agreement
    sheet.png         examples of every cluster, the clearest first, border cases last
    parts.parquet, tissue.parquet   what was measured, kept for the next call
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_rand_score

from counterstain.audit.audit import sheet
from counterstain.audit.fidelity import TIMM, network_features, timm_name
from counterstain.audit.judge import describe, load_judge
from counterstain.data.cohort import FORMAT, Cohort
from counterstain.data.overlays import outlined, resized
from counterstain.data.split import check_no_leak, link_packs
from counterstain.data.stains import Stain
from counterstain.devices import choose_device
from counterstain.discovery.appearance import (
    BATCH,
    MEASURED,
    PART,
    SQUARES,
    Network,
    list_parts,
    measure_by_network,
    measure_stains,
    square_at,
    square_px,
)
from counterstain.discovery.clusters import NUMBERS, STABLE, mixture, scaled, stability, without_slide_effects
from counterstain.errors import ConfigError, InputError, MismatchError, StorageError
from counterstain.progress import counted
from counterstain.segmentation.timm_networks import identity
from counterstain.storage import (
    claimed,
    read_csv,
    read_json,
    replacing,
    sha256_of,
    write_csv,
    write_json,
    write_parquet,
    write_sealed,
)
from counterstain.taxonomy import IGNORE, Subtype, Taxonomy, check_names, colours

STAINS = "stains"
LOGGED = ("stain", "stain_high", "stain_spread", "nuclear", "nuclear_spread", "nuclei", "nucleus_um", "texture")
FLOOR = 0.02  # below it a density is none
BORDER = 0.75  # certainty below which an instance is a border case
CLEAR, BORDERS, SHOWN_PX = 6, 3, 128  # examples of a cluster, and their edge in the picture
TRAITS = {  # what is high, what is low
    "lines": ("in lines", "in blotches"),
    "rim": ("strongest at the rim", "weak at the rim"),
    "nuclear": ("dark nuclei", "pale nuclei"),
    "nuclei": ("dense nuclei", "sparse nuclei"),
    "nucleus_um": ("large nuclei", "small nuclei"),
    "texture": ("coarse nuclei", "smooth nuclei"),
}
TABLE = [
    "region", "instance", "slide", "patient", "split", "subtype", "cluster", "certainty", "border", "parts", "known",
    "area_px", *MEASURED,
]  # fmt: skip
TOLD, MOST_TRAITS = 0.4, 2  # standard deviations from which a trait is told, and how many are
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
Known = tuple[str, Network]  # a network with the hash of its weights


@dataclass(frozen=True, kw_only=True, repr=False)
class Discovery:
    """Subtypes that were found: the new cohort, and tables as its folder holds them.

    Examples
    --------
    >>> found = discover("cohort", out="found", k=2)
    >>> found.cohort.taxonomy.names
    ('found 1', 'found 2')
    """

    cohort: Cohort
    instances: pd.DataFrame
    clusters: pd.DataFrame
    stability: pd.DataFrame  # k, agreement of refits on resampled patients
    fitted: str  # whose instances the clusters were fitted on
    agreement: dict[str, float]  # adjusted Rand index with known subtypes, of fitted and of other patients
    undescribed: int  # instances too small to be described, which are to be ignored

    def __repr__(self) -> str:
        shown = self.clusters[["subtype", "words", "instances", "patients", "border"]]
        return f"Discovery({self.cohort.folder}, fitted on {self.fitted})\n{shown.to_string(index=False)}"


def open_network(features: str, weights: Path | None, cohort: Cohort, device: Any) -> Known | None:
    """Open what describes instances: None for ``stains``, a judge in a folder, or a network of timm.

    Raises LeakageError where a judge saw a validation or test patient, MismatchError where it learnt from another
    resolution, and ConfigError or InputError where there is no such network.
    """
    if weights is not None and not features.startswith(TIMM):
        raise ConfigError(f"weights {weights}: are for features timm:NAME")
    if features == STAINS:
        return None
    if features.startswith(TIMM):
        name = timm_name(features)
        return identity(name, weights), network_features(name, weights, choose_device(device), BATCH)
    if not (Path(features) / "model.json").exists():
        raise ConfigError(f"features {features}: expected stains, the folder of a judge, timm:NAME or timm:FOLDER")
    judge, header = load_judge(Path(features), device)
    if not cohort.is_at(header.mpp):
        raise MismatchError(
            f"{features}: the judge learnt at {header.mpp:g} um/px, {cohort.folder} is at {cohort.mpp:g}; give another"
        )
    check_no_leak(header.patients_seen, cohort, f"the judge {features}")
    return header.sha256, lambda patches: describe(judge, patches)


def discover_subtypes(
    cohort: Cohort,
    out: Path,
    *,
    k: int | None,
    stain: Stain,
    network: Known | None,
    correction: bool,
    names: Sequence[str] | None,
    ignore_below: float,
    seed: int,
    progress: Progress,
) -> Discovery:
    """Find subtypes and write the cohort that has them; what was measured and named before is kept.

    ``k`` None: the largest number of clusters that resampled patients confirm; ``correction``: take slide effects off.
    Clusters are fitted on training patients where the cohort is split, otherwise on all.

    Raises InputError where no number of clusters is stable, or there is too little to cluster; ConfigError where
    ``names`` are not one for each cluster; MismatchError where ``out`` belongs to another run.
    """
    settings: dict[str, Any] = {"cohort": cohort.fingerprint, "k": k or "auto", "stain": stain}
    settings |= {"correction": correction, "seed": seed}
    settings["network"] = None if network is None else network[0]
    split = bool(cohort.regions["split"].notna().any())
    _fitting(cohort, list_parts(cohort), k)  # before minutes of measuring
    with claimed(out, "discover", settings):
        parts, tissue = _measured(cohort, out, stain, network, progress)
        fitting = _fitting(cohort, parts, k)
        points = _points(cohort, parts, tissue, fitting, correction=correction, network=network is not None)
        patients = cohort.regions["patient"].iloc[parts["position"]].to_numpy()
        k, tried = _number(cohort, out, points[fitting], patients[fitting], k=k, seed=seed, progress=progress)
        model = mixture(points[fitting], k, seed)
        found = _by_instance(cohort, parts, model.predict_proba(points), model.score_samples(points))
        clusters = _clusters(found, stain)
        named = _named(out, names, k)
        taxonomy, ids = _taxonomy(cohort.taxonomy, named)
        of_cluster = [ids[name] for name in named]
        found["id"] = np.where(found["certainty"] < ignore_below, IGNORE, np.take(of_cluster, found["cluster"]))
        found["subtype"], clusters["subtype"] = found["id"].map(taxonomy.name_of), named
        write_csv(out / "clusters.csv", clusters)
        _draw(cohort, found, clusters, out / "sheet.png")
        write_json(out / "names.json", named)
        source = {"kind": "discovered", "settings": settings, "names": named, "ignore_below": ignore_below}
        source |= {key: cohort.source[key] for key in ("patients_seen",) if key in cohort.source}
        new = _write_cohort(cohort, out, taxonomy, found, source)
        table = found[TABLE].assign(known=found["known"].map(cohort.taxonomy.name_of), cluster=found["cluster"] + 1)
        write_csv(out / "instances.csv", table)
    return Discovery(
        cohort=new,
        instances=table,
        clusters=clusters,
        stability=tried,
        fitted=counted(len({*patients[fitting]}), "training patient" if split else "patient"),
        agreement=_agreement(found, split=split),
        undescribed=int((cohort.instances["subtype"] != IGNORE).sum()) - len(found),
    )


def _fitting(cohort: Cohort, parts: pd.DataFrame, k: int | None) -> np.ndarray:
    """Say which parts clusters are fitted on, (n,) bool; raise InputError where these are too few."""
    known = cohort.regions[["split", "patient"]].iloc[parts["position"]]
    fitting = known["split"].eq("train").to_numpy() | cohort.regions["split"].isna().all()
    patients = known["patient"][fitting].nunique()
    if fitting.sum() <= 2 * (k or max(NUMBERS)) or patients < 2:
        of = counted(patients, "patient" if fitting.all() else "training patient")
        raise InputError(
            f"{cohort.folder}: {counted(int(fitting.sum()), 'instance')} of {of} are too few to cluster; import tissue "
            "of more patients, or split it anew" + ("" if k is None else ", or give a smaller --k")
        )
    return np.asarray(fitting)


def _measured(
    cohort: Cohort, out: Path, stain: Stain, network: Known | None, progress: Progress
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the parts of instances, and a row for each slide, with what was measured of them."""
    files = [out / "parts.parquet", out / "tissue.parquet"]
    parts, tissue = _kept(files[0], [*PART, *MEASURED]), _kept(files[1], ["slide", *MEASURED])
    if parts is None or tissue is None:
        parts = list_parts(cohort)
        with progress("stains and nuclei", len(parts)) as advance:
            parts, tissue = measure_stains(cohort, parts, stain, advance)
        if network is not None and len(parts):
            with progress("network", len(parts) + SQUARES * len(cohort)) as advance:
                features, of_slides = measure_by_network(cohort, parts, network[1], advance)
            named = pd.DataFrame(features).add_prefix("network_")
            parts = pd.concat([parts, named], axis=1)
            of_slides = of_slides.rename(columns={i: f"network_{i}" for i in range(features.shape[1])})
            tissue = tissue.merge(of_slides, on="slide")
        for file, table in zip(files, (parts, tissue), strict=True):
            write_parquet(file, table)
    return parts, tissue


def _kept(file: Path, columns: Sequence[str]) -> pd.DataFrame | None:
    """Return a table that an earlier call has written; None where there is none, or it is damaged."""
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else read_csv(file)
    except (OSError, ValueError):  # pandas and Arrow derive theirs from these
        return None
    return table if {*columns} <= {*table} else None


def _points(
    cohort: Cohort, parts: pd.DataFrame, tissue: pd.DataFrame, fitting: np.ndarray, *, correction: bool, network: bool
) -> np.ndarray:
    """Return what is clustered, (n, d)."""
    columns = [name for name in parts if str(name).startswith("network_")] if network else list(MEASURED)
    values, of_slides = _logged(parts[columns]).to_numpy(), _logged(tissue.set_index("slide")[columns])
    if correction:
        slides = cohort.regions["slide"].iloc[parts["position"]].to_numpy()
        values = without_slide_effects(values, slides, of_slides, fitting)
    return scaled(values, fitting, network=network)


def _logged(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(**{name: np.log(table[name].clip(lower=FLOOR)) for name in LOGGED if name in table})


def _number(
    cohort: Cohort, out: Path, points: np.ndarray, patients: np.ndarray, *, k: int | None, seed: int, progress: Progress
) -> tuple[int, pd.DataFrame]:
    """Return how many clusters there are, and how stable every number is that was tried."""
    numbers = list(NUMBERS) if k is None else [k]
    file = out / "stability.csv"
    tried = _kept(file, ["k", "agreement"])
    if tried is None or tried["k"].tolist() != numbers:
        with progress("clusters of resampled patients", len(numbers)) as advance:
            agreement = []
            for number in numbers:
                agreement.append(stability(points, patients, number, seed))
                advance(1)
        tried = pd.DataFrame({"k": numbers, "agreement": agreement})
        write_csv(file, tried)
    stable = tried.loc[tried["agreement"] >= STABLE, "k"]
    if k is None and stable.empty:
        best, index = tried.sort_values("agreement").to_numpy()[-1].tolist()
        raise InputError(
            f"{cohort.folder}: no number of subtypes is stable: clusters of resampled patients agree with at most "
            f"{index:.2f} (at {best:.0f}; {STABLE:g} is needed). Either its instances are of one kind, or "
            f"{counted(len({*patients}), 'patient')} are too few to tell; give --k {best:.0f} and another --out to "
            "cluster them anyway"
        )
    return int(stable.max()) if k is None else k, tried


def _by_instance(cohort: Cohort, parts: pd.DataFrame, shares: np.ndarray, density: np.ndarray) -> pd.DataFrame:
    """Let the parts of every instance vote, by their areas; clusters are numbered from the palest, 0, on."""
    area = parts["area_px"].to_numpy()[:, None]
    strength = (shares * area * parts[["stain"]].to_numpy()).sum(axis=0) / np.maximum((shares * area).sum(axis=0), 1e-9)
    shares = shares[:, np.argsort(strength, kind="stable")]
    columns = [*MEASURED, *range(shares.shape[1]), "density"]
    values = pd.concat([parts[list(MEASURED)], pd.DataFrame(shares), pd.Series(density, name="density")], axis=1)
    keys = [parts["position"], parts["instance"]]
    means = (values * area).groupby(keys).sum().div(parts["area_px"].groupby(keys).sum(), axis=0)[columns]
    votes = means[list(range(shares.shape[1]))].to_numpy()
    largest = parts.sort_values("area_px", ascending=False).drop_duplicates(["position", "instance"])
    found = means[[*MEASURED, "density"]].reset_index()
    found = found.assign(cluster=votes.argmax(axis=1), certainty=votes.max(axis=1))
    found["parts"] = parts.groupby(["position", "instance"]).size().to_numpy()
    found = found.merge(largest[PART], on=["position", "instance"])
    about = cohort.regions[["region", "slide", "patient", "split"]].iloc[found["position"]].reset_index(drop=True)
    found = pd.concat([about, found.assign(border=found["certainty"] < BORDER)], axis=1)
    known = cohort.instances[["region", "instance", "subtype", "area_px"]].rename(columns={"subtype": "known"})
    return found.merge(known, on=["region", "instance"])


def _clusters(found: pd.DataFrame, stain: Stain) -> pd.DataFrame:
    """Return a row per cluster with what is typical of it."""
    rows, logged = [], _logged(found[list(MEASURED)])
    spread = logged.std().replace(0, 1)
    for cluster in range(int(found["cluster"].max()) + 1):
        own = found["cluster"] == cluster
        typical = ((logged[own].mean() - logged.mean()) / spread).fillna(0)
        told = sorted((name for name in TRAITS if abs(typical[name]) >= TOLD), key=lambda name: -abs(typical[name]))
        colour = f"{'brown' if stain == 'dab' else 'pink'} {found.loc[own, 'stain'].mean():.2f}"
        words = ", ".join([colour, *(TRAITS[name][int(typical[name] < 0)] for name in told[:MOST_TRAITS])])
        row = {"cluster": cluster + 1, "words": words, "instances": int(own.sum())}
        row |= {"border": int(found.loc[own, "border"].sum()), "patients": found.loc[own, "patient"].nunique()}
        share = found.loc[own, "area_px"].sum() / found["area_px"].sum()
        rows.append(row | {"area_share": float(share), **found.loc[own, list(MEASURED)].mean()})
    return pd.DataFrame(rows)


def _named(out: Path, names: Sequence[str] | None, k: int) -> list[str]:
    """Return the names of clusters: those given, those given before, or ``found 1``, ``found 2``, …"""
    if names is None:
        file = out / "names.json"
        kept = read_json(file) if file.exists() else [f"found {number}" for number in range(1, k + 1)]
        if not isinstance(kept, list) or len(kept) != k or not all(isinstance(name, str) for name in kept):
            raise StorageError(f"{file}: damaged (expected {k} names); give --names")
        return kept
    if all(name == "ignore" for name in names):
        raise ConfigError("--names: expected one cluster at least that is not called ignore")
    if len(names) != k:
        raise ConfigError(f"--names: expected {k} names, one for each cluster, found {len(names)} ({', '.join(names)})")
    check_names(dict.fromkeys(name for name in names if name != "ignore"), "--names")
    return list(names)


def _taxonomy(known: Taxonomy, names: Sequence[str]) -> tuple[Taxonomy, dict[str, int]]:
    """Return the subtypes; clusters of one name are one subtype, those called ``ignore`` are none."""
    kept = [name for name in dict.fromkeys(names) if name != "ignore"]
    shown = zip(kept, colours(len(kept)), strict=True)
    subtypes = [Subtype(id=i, name=name, colour=colour) for i, (name, colour) in enumerate(shown, start=1)]
    taxonomy = Taxonomy(name="found", tissue_class=known.tissue_class, subtypes=tuple(subtypes))
    return taxonomy, {"ignore": IGNORE} | {subtype.name: subtype.id for subtype in subtypes}


def _write_cohort(cohort: Cohort, out: Path, taxonomy: Taxonomy, found: pd.DataFrame, source: dict[str, Any]) -> Cohort:
    """Write the tables of the new cohort, over the pixels of the first; ``cohort.json`` comes last."""
    keys = ["region", "instance"]
    new = cohort.instances[keys].merge(found[[*keys, "id"]], on=keys, how="left")["id"].fillna(IGNORE)
    instances = cohort.instances.assign(subtype=new.astype("int64").to_numpy())
    header = {"format": FORMAT, "taxonomy": taxonomy.model_dump(mode="json"), "mpp": cohort.mpp, "source": source}
    link_packs(cohort.folder, out)
    if (out / "cohort.json").exists():
        with suppress(StorageError):  # what is damaged is written anew
            written = Cohort.open(out)
            if (written.taxonomy, written.source) == (taxonomy, source) and written.instances.equals(instances):
                return written
        (out / "cohort.json").unlink()
    write_parquet(out / "regions.parquet", cohort.regions)
    write_parquet(out / "instances.parquet", instances)
    tables = {name: [sha256_of(out / f"{name}.parquet")] for name in ("regions", "instances")}
    write_sealed(out / "cohort.json", header | {"tables": tables})
    return Cohort.open(out)


def _agreement(found: pd.DataFrame, *, split: bool) -> dict[str, float]:
    """Return the adjusted Rand index with the subtypes of the first cohort, where it has several."""
    if found["known"].nunique() < 2:
        return {}
    groups = {"training patients": found["split"] == "train", "other patients": found["split"] != "train"}
    groups = groups if split else {"all patients": found["split"].isna()}
    return {
        name: float(adjusted_rand_score(found.loc[own, "known"], found.loc[own, "cluster"]))
        for name, own in groups.items()
        if own.any()
    }


def _draw(cohort: Cohort, found: pd.DataFrame, clusters: pd.DataFrame, file: Path) -> None:
    """Draw examples of every cluster, of different patients where there are: the clearest, then border cases."""
    edge = square_px(cohort, 1)
    blank = np.full((SHOWN_PX, SHOWN_PX, 3), 255, np.uint8)
    rows: dict[str, list[np.ndarray]] = {}
    for row in clusters.itertuples():
        own = found[found["cluster"] == row.Index]
        ordered = own.assign(sure=own["certainty"].round(2)).sort_values(["sure", "density"], ascending=False)
        ordered = ordered.iloc[np.argsort(ordered.groupby("patient").cumcount(), kind="stable")]
        clear = ordered[~ordered["border"]].head(CLEAR)
        border = own.drop(clear.index).nsmallest(BORDERS, "certainty")
        shown = [[_example(cohort, part, edge) for part in table.itertuples()] for table in (clear, border)]
        filled = [*shown[0], *[blank] * (CLEAR - len(shown[0])), *shown[1], *[blank] * (BORDERS - len(shown[1]))]
        rows[f"{row.cluster} {row.subtype}: {row.words}"] = filled
    captions = [*(["clear"] * CLEAR), *(["border case"] * BORDERS)]
    with replacing(file) as partial:
        sheet(rows, captions).save(partial, format="PNG")


def _example(cohort: Cohort, part: Any, edge: int) -> np.ndarray:
    y, x = (
        int(start + length // 2 - edge // 2)
        for start, length in ((part.y_px, part.height_px), (part.x_px, part.width_px))
    )
    square = square_at(cohort, part.position, y, x, edge)
    alone = replace(square, instances=np.where(square.instances == part.instance, part.instance, 0))
    return resized(outlined(alone, marked=[part.instance]), (SHOWN_PX, SHOWN_PX))
