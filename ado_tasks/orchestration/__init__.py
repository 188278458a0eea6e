"""One graph, two drivers: `dvc.yaml` read by DVC's own resolver, as plain dataclasses, as Airflow tasks.

`resolve` → `graph` → `render` is what a DAG file needs; `stage` runs one stage in a workspace of its own, anywhere.
Only `render` imports Airflow.
"""
