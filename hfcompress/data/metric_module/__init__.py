"""The metrics of hfcompress as a module that `evaluate.load` takes."""
