"""What takes long says so where there is no terminal: a line as it begins, and one for each quarter."""

from suture.core.progress import counted, shown


def test_counted_items_are_told_by_quarters(capsys):
    told = []
    for item in counted("surgery", "fitting", range(8), 8):
        told.append((item, capsys.readouterr().out))
    assert [item for item, _ in told] == list(range(8))
    assert {item: line for item, line in told if line} == {
        0: "surgery: fitting\n",
        2: "surgery: fitting, 25%\n",
        4: "surgery: fitting, 50%\n",
        6: "surgery: fitting, 75%\n",
    }
    assert capsys.readouterr().out == "surgery: fitting, 100%\n"


def test_another_doing_begins_anew(capsys):
    with shown("build") as show:
        for what, fraction in (("parsing", None), ("building", 0.6), ("building", 0.7), ("building", 0.8)):
            show(what, fraction)
    assert capsys.readouterr().out.splitlines() == ["build: parsing", "build: building", "build: building, 80%"]
