//! The composition root of a node.

use crate::config::Config;

/// Runs a node until it is told to stop.
pub async fn run(_config: Config) -> anyhow::Result<()> {
    anyhow::bail!("not built yet")
}
