"""What ``tprt doctor`` looks at: a file per part of a machine, each probe a function to a ``Check``."""
