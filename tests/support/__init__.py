"""Pieces that several tests share: models, runs, servers, commands. No test lies here."""
