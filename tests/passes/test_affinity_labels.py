"""Labels that AffinityNet learns from: what two plain dCRFs agree on."""

import numpy as np
import pytest
from support.images import opened, seeded

from isim import metrics
from isim.data.files import read_label_map
from isim.labels.crf import refine as crf


def test_labels_are_what_two_plain_crfs_agree_on(whole, items, stored, tiny):
    (figures, folder), params = whole("affinity_labels.make"), tiny.train_affinity
    thresholds = (params.foreground_threshold, params.background_threshold)
    sure, confusion = [], np.zeros((4, 4), int)
    for item in items:
        image, _, truth = opened(item)
        cuts = [seeded(item, stored, threshold) for threshold in thresholds]
        high, low = (crf.refine(image, seed, item.class_ids, params.crf) for seed in cuts)
        label = read_label_map(folder / f"labels/{item.id}.png")
        assert np.array_equal(label, np.where(high == low, high, 255))
        sure += (label < 255).ravel().tolist()
        truth[label == 255] = 255
        confusion += metrics.confusion_matrix(truth, label % 255, 4)
    assert figures == {
        "sure_share": pytest.approx(np.mean(sure)),
        "sure_accuracy": pytest.approx(np.trace(confusion) / confusion.sum()),
        "sure_miou": pytest.approx(metrics.miou(confusion)),
    }
