"""From photographs or synthetic images to preprocessed/ and index/. Knows nothing of the wire."""
