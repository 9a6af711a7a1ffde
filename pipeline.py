"""python pipeline.py --model NAME | --checkpoint DIR --out DIR: all stages in order, as `suture run` does."""

from suture.core.command import run
from suture.pipeline import main

if __name__ == "__main__":
    run("pipeline", main)
