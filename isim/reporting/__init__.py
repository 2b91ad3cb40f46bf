"""Reporting: MLflow runs, plots, pictures, the result table, the archive for VOC's server."""
