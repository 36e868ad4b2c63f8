"""Distil a teacher into students that need half the sampling steps after every round.

    python -m jobs.pretrain configs/text/quickstart.yaml
    python -m jobs.distill configs/distill/quickstart.yaml

`distill.teacher` names the teacher: a model folder, released weights, models:/NAME@ALIAS or hf:OWNER/NAME/FILE. The
same command continues an interrupted run.
"""

from jobs.cli import main
from jobs.plan import plan
from jobs.pretrain import report
from pipeline.training.launch import distill

if __name__ == "__main__":
    main(lambda config: report(distill(config)), plan)
