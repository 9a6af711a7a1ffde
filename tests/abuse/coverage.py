"""python -m tests.abuse.coverage: how many cases there are of each kind for each stage."""

from collections import Counter

from tests.abuse.case import ARGUMENTS
from tests.abuse.tables import cases


def main() -> None:
    counts = Counter((case.kind, case.stage) for case in cases())
    print("kind " + "".join(f"{stage:>17}" for stage in ARGUMENTS))
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:4} " + "".join(f"{counts[kind, stage] or '-':>17}" for stage in ARGUMENTS))
    print(f"{counts.total()} cases")


if __name__ == "__main__":
    main()
