"""Before a pixel reaches a model: cohorts, sampling, relabelling, patch sets, the phantom."""
