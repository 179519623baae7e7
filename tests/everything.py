"All stages of a pipeline in this process, without DVC and papermill."
import nbformat
from conftest import ROOT

from semmae.pipeline.parts import parts_stage
from semmae.pipeline.settings import check_params
from semmae.pipeline.teacher import teacher_stage
from semmae.pipeline.train import train_stage
from semmae.pipeline.tune import finetune_stage, segment_stage


def run_notebook(name, root):
    "Run the cells of a stage here, on another project than this one"
    known, cells = {}, nbformat.read(ROOT/f'nbs/pipeline/{name}.ipynb', 4).cells
    for c in [c for c in cells if c.cell_type == 'code']:
        exec(c.source, known)
        if 'parameters' in c.metadata.get('tags', []):
            known['root'] = str(root)


def run_everything(root, report=True):
    check_params(root/'params.yaml')
    teacher_stage(root)
    parts_stage(root)
    train_stage(root)
    run_notebook('probe', root)
    finetune_stage(root)
    segment_stage(root)
    if report:
        run_notebook('report', root)
