"""barepp: pipeline-parallel training that is bit-identical to one process."""
