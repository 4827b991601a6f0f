"""The relevance IR: `core` (read first), `ops` (the catalogue), builder, text form, verifier, interpreter."""
