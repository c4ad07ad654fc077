"""Measurements on random weights: ``tprt bench``. Ratios come from runs interleaved with a peer."""
