"""isim: from image tags to pixel masks (ISIM, weakly supervised segmentation)."""

__version__ = "0.1.0"
