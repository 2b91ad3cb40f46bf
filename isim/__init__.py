"""isim: from image tags to pixel masks (ISIM, weakly supervised segmentation)."""
