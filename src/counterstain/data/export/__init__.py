"""The way out: cohorts and synthetic sets as ordinary images, as an nnU-Net dataset, as a Hugging Face image folder."""

from counterstain.data.export.write import ExportConfig, export

__all__ = ["ExportConfig", "export"]
