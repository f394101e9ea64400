//! A seeded world for tests.
