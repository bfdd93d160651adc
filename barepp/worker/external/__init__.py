"""Ranks that torchrun or Slurm's srun has started.

In reading order:

    environment.py  what the environment variables of torchrun and srun say
    secret.py       the job's secret, where no launcher of ours hands it over
    adopt.py        how such a rank gets into its world, and how it ends
"""
