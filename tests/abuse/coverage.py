"""python -m tests.abuse.coverage: how many cases there are of each kind for each stage."""

from collections import Counter

from tests.abuse.case import ARGUMENTS, CUTTERS, PICTURED
from tests.abuse.tables import cases

LEAST = 20  # of each kind for each stage that reads what it is about
GRAPHS = ("surgery", "build", "validate", "generate", "check", "compare", *CUTTERS)
WRITERS = ("export", "surgery", "build", "validate", *CUTTERS)
ALL = ("export", *GRAPHS, "convert", "golden", "bundle")
OF: dict[int, tuple[tuple[str, ...], str]] = {  # by kind: the stages that can meet it, and why no other one can
    1: ((*GRAPHS, "serve", "export.networks", "generate.picture"),
    "reads no file that can name another: checkpoints have no such names, "
        "and golden outputs and bundles are arrays"),
    2: ((*(stage for stage in ALL if stage != "bundle"), "serve", "generate.picture", "generate.mask"),
    "writes what validate writes: its cases are there"),
    3: (WRITERS, "keeps no results that could be up to date"),
    4: ((*ALL, "pipeline"), ""),
    5: ((*(stage for stage in (*ALL, "pipeline", "serve") if stage != "convert"), "generate.picture", "generate.mask"),
    "takes no number or word but files"),
    6: (("validate", "compare"),
    "compares no values of two graphs; what surgery, check and golden compute goes through the same comparison"),
    7: (("validate",), "does not judge what another stage has written"),
    8: (WRITERS,
    "writes into no folder that a run locks; convert and generate write files under names of their own, and rename them"),
    9: (WRITERS, "removes nothing that an earlier run wrote"),
    10: ((*ALL, "serve", *PICTURED), "reads files through its stages alone"),
    11: ((*ALL, "serve", *PICTURED), "reads files through its stages alone"),
    12: (("export", *GRAPHS, "pipeline"), "prints through validate, or, convert, a line or two of paths"),
    13: ((*GRAPHS, "serve"), "reads no graph of somebody else's but through validate"),
}  # fmt: skip


def main() -> None:
    counts = Counter((case.kind, case.stage) for case in cases())
    width = max(map(len, ARGUMENTS)) + 2
    print("kind" + "".join(f"{stage:>{width}}" for stage in ARGUMENTS))
    for kind in OF:
        print(f"{kind:4}" + "".join(f"{counts[kind, stage] or '-':>{width}}" for stage in ARGUMENTS))
    print(f"{counts.total()} cases\n-: a stage that")
    for kind, (_, reason) in OF.items():
        if reason:
            print(f"{kind:4}  {reason}")


if __name__ == "__main__":
    main()
