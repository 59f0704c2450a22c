"""From raw or drawn images to preprocessed/ and index/. Knows nothing of the wire."""
