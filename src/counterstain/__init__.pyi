# The public names and where they live.

from .api.cohorts import (
    discover as discover,
    export as export,
    inspect as inspect,
    make_phantom as make_phantom,
    split as split,
)
from .api.drawing import (
    Generator as Generator,
    add_to_set as add_to_set,
    load_generator as load_generator,
)
from .api.evaluation import (
    compare_arms as compare_arms,
    evaluate as evaluate,
    predict as predict,
    segment as segment,
)
from .api.generators import (
    preview as preview,
    redraw as redraw,
    synthesize as synthesize,
    train as train,
)
from .api.imports import (
    import_dataset as import_dataset,
    import_exact as import_exact,
    import_labels as import_labels,
    import_slides as import_slides,
    import_table as import_table,
)
from .api.readings import (
    audit as audit,
    make_reading_test as make_reading_test,
    review as review,
    score_reading_test as score_reading_test,
    trace as trace,
)
from .api.scores import score as score
from .api.settings import (
    config_explain as config_explain,
    config_reference as config_reference,
    config_schema as config_schema,
    config_show as config_show,
    config_taxonomy as config_taxonomy,
)
from .api.sharing import import_weights as import_weights, pull as pull, push as push, release as release
from .api.studies import (
    clean_study as clean_study,
    demo as demo,
    headroom as headroom,
    init_study as init_study,
    plan_study as plan_study,
    report as report,
    run_study as run_study,
    study_status as study_status,
    test_study as test_study,
)
from .app import studio as studio
from .audit.reading_test import ReadingTest as ReadingTest
from .data.cohort import Cohort as Cohort, CohortWriter as CohortWriter
from .data.patch_set import PatchSet as PatchSet
from .data.patches import Patch as Patch, Source as Source
from .data.region_store import Region as Region
from .data.relabel import RelabelConfig as RelabelConfig, relabel as relabel
from .data.review import Review as Review
from .data.sampling import PatchSampler as PatchSampler, SamplingConfig as SamplingConfig
from .errors import (
    ConfigError as ConfigError,
    CounterstainError as CounterstainError,
    CounterstainWarning as CounterstainWarning,
    DivergenceError as DivergenceError,
    InputError as InputError,
    LeakageError as LeakageError,
    MismatchError as MismatchError,
    StorageError as StorageError,
    TaxonomyError as TaxonomyError,
)
from .generators.interface import DrawRequest as DrawRequest, ImageGenerator as ImageGenerator
from .generators.methods import Method as Method, Training as Training, register as register
from .recipe import Recipe as Recipe, load_recipe as load_recipe
from .segmentation.counts import measures as measures
from .study.config import StudyConfig as StudyConfig, load_study as load_study
from .synthesis.by_hand import Redrawing as Redrawing
from .taxonomy import Subtype as Subtype, Taxonomy as Taxonomy

__version__: str
