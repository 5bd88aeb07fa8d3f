from reshard.storage.runtime.reports import RankReport, Report


def rank(number: int) -> RankReport:
    seconds = {"fetch": float(number), "total": 2.0}
    return RankReport(number, bytes_needed=100, bytes_fetched=60, requests=2, chunks=3, seconds=seconds)


def test_a_total_adds_up_and_takes_the_longest() -> None:
    report = Report(1, tuple(rank(number) for number in range(3)))
    assert report.local is report.ranks[1]
    total = report.total
    assert (total.rank, total.bytes_needed, total.bytes_fetched, total.requests, total.chunks) == (None, 300, 180, 6, 9)
    assert total.seconds == {"fetch": 2.0, "total": 2.0}
    assert total.amplification == 0.6
    assert RankReport(0).amplification == 0


def test_notebooks_show_a_table() -> None:
    shown = Report(0, tuple(map(rank, range(3))), missing_keys=("<a>",))._repr_html_()
    assert shown.count("<tr>") == 1 + 1 + 3
    assert "1 missing key" in shown
    many = Report(0, tuple(map(rank, range(1000))))._repr_html_()
    assert many.count("<tr>") < 100
    assert "rank 999" in many
    assert rank(1)._repr_html_().count("<tr>") == 2


def test_a_report_of_many_ranks_shows_all_together_and_this_one() -> None:
    assert str(Report(0, tuple(map(rank, range(8))))).count("\n") == 8
    lines = str(Report(7, tuple(map(rank, range(1024))))).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["all ranks", "rank 7"]
