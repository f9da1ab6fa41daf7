"""Checks of whole data sets."""

import numpy as np

from fastuda.data.tools.check import check_domain, contact_sheet
from tests.data.data_files import save


def test_report_of_a_good_data_set(source, tmp_path):
    report = check_domain(source, need_labels=True, workers=0, quiet=True)
    text = report.text()
    assert not report.problems and not report.notes
    assert report.labelled == 5 and report.sizes == {(36, 20): 5}
    assert "nothing wrong" in text and "36x20 (5)" in text and "traffic light" in text
    assert report.pixels.sum() == 5 * 720
    labels = [source.read_label(i) for i in range(5)]
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}
    for name, c in (("road", 0), ("bicycle", 18), ("ignored", 255)):
        share = 100 * sum((label == c).sum() for label in labels) / (5 * 720)
        assert rows[name] == [f"{share:.3f}", str(sum((label == c).any() for label in labels))]
    assert contact_sheet(source, tmp_path / "a" / "sheet.png").stat().st_size > 1000


def test_report_names_everything_that_is_wrong(source, tmp_path):
    items = source.items
    items[0].image.write_bytes(items[0].image.read_bytes()[:99])
    save(np.full((20, 36), 200, np.uint8), items[1].label)
    save(np.full((9, 36), 7, np.uint8), items[2].label)
    items[4].image.write_bytes(items[3].image.read_bytes())
    report = check_domain(source, need_labels=True, workers=2, quiet=True)
    found = "\n".join(report.problems)
    assert len(report.problems) == 3
    assert f"{items[0].image} cannot be read" in found
    assert f"{items[1].label} holds label values [200]" in found
    assert f"{items[2].label} is 36x9, its image is 36x20" in found
    assert report.notes[-1:] == [f"{items[4].image} is the same image as {items[3].image}"]
    contact_sheet(source, tmp_path / "sheet.png")
