"""python -m tests.abuse.run --record FILE --minutes 15: the cases of the table, one after another, and what each showed.

FILE gets a line of JSON a case: its name, seconds and what broke. A further run with the same FILE runs the cases that have none,
so that the table can be run in pieces. Prints those that broke a promise, and the counts; exit status 1 where one is broken, 75
where some are left.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.abuse.server import Server
from tests.abuse.sources import Sources
from tests.abuse.tables import cases

LEFT = 75  # EX_TEMPFAIL: run it again


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, default=Path("out/abuse.jsonl"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="the I-th of N equal shares of them")
    options = parser.parse_args()
    options.record.parent.mkdir(parents=True, exist_ok=True)
    lines = options.record.read_text().splitlines() if options.record.exists() else []
    ran = {entry["case"]: entry for entry in map(json.loads, lines)}
    share, shares = map(int, options.share.split("/"))
    wanted = [case for case in cases() if options.only in case.id][share - 1 :: shares]
    left = [case for case in wanted if case.id not in ran]
    ends, server = time.monotonic() + 60 * options.minutes, Server()
    sources = Sources(options.record.with_suffix(".inputs"), server)  # kept, for the next run
    sources.folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(options.record, "a", encoding="utf-8") as record:
        for number, case in enumerate(left):
            if time.monotonic() > ends:
                break
            started, work = time.monotonic(), Path(folder, f"case{number}", "work")
            broken, result = sources.run(case, work)
            ran[case.id] = {"case": case.id, "broken": broken, "seconds": round(time.monotonic() - started, 2),
                            "cpu": round(result.cpu, 2), "said": result.err[-1000:] if broken else ""}  # fmt: skip
            print(json.dumps(ran[case.id]), file=record, flush=True)
            shutil.rmtree(work.parent, ignore_errors=True)
    server.close()
    found = [ran[case.id] for case in wanted if case.id in ran]
    for entry in found:
        if entry["broken"]:
            print(f"{entry['case']}: {'; '.join(entry['broken'])}\n    {entry['said']}")
    failed = sum(bool(entry["broken"]) for entry in found)
    used = sum(entry["cpu"] for entry in found)
    print(f"{len(found)} of {len(wanted)} cases have run; {failed} of them broke a promise; {used:.0f} s of processor time")
    return 1 if failed else LEFT if len(found) < len(wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
