"""python -m tests.abuse.coverage: how many cases there are of each kind for each stage."""

from collections import Counter

from tests.abuse.case import ARGUMENTS
from tests.abuse.tables import cases

LEAST = 20  # of each kind for each stage that reads what it is about
GRAPHS = ("surgery", "build", "validate", "generate", "check", "compare", "surgery.capacity")
WRITERS = (
    "surgery",
    "build",
    "validate",
    "surgery.capacity",
)  # of a folder with a manifest; compare and golden write through validate's
OF = {
    1: GRAPHS,
    2: ("export", *WRITERS, "generate", "convert", "check", "golden"),
    3: WRITERS,
    4: (*WRITERS, "generate", "convert", "check", "pipeline"),
    5: ("export", *WRITERS, "generate", "check", "compare", "pipeline"),
    6: ("validate", "compare"),
    7: ("validate",),
    8: ("export", *WRITERS),
    9: WRITERS,
    10: ("export", *GRAPHS[:-1], "convert", "golden"),
    11: ("export", *GRAPHS[:-1], "convert", "golden"),
    12: (*GRAPHS, "pipeline"),
    13: GRAPHS,
}


def main() -> None:
    counts = Counter((case.kind, case.stage) for case in cases())
    print("kind " + "".join(f"{stage:>17}" for stage in ARGUMENTS))
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:4} " + "".join(f"{counts[kind, stage] or '-':>17}" for stage in ARGUMENTS))
    print(f"{counts.total()} cases")


if __name__ == "__main__":
    main()
