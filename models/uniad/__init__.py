"""UniAD's networks (OpenDriveLab/UniAD, projects/configs/stage2_e2e/base_e2e.py), a file each, under the names of the published weights."""
