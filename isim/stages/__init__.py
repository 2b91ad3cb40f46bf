"""Stages of the pipeline, a module each: load, compute, publish, report."""
