"""Tests beside transformers; a package, so that its files may be named as those above."""
