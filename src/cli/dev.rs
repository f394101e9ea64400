//! A whole cluster on this machine.

use std::path::PathBuf;
use std::time::Duration;

/// Arguments of `quorate dev`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// How many members
    #[arg(long, default_value_t = 3)]
    pub replicas: u16,
    /// Where their state lives [default: a directory that goes when the cluster stops]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Kill a member, and start it again, at this interval
    #[arg(long, value_name = "DURATION", value_parser = crate::config::units::duration::parse)]
    pub kill_one_every: Option<Duration>,
    /// Client ports of the members; more follow 10000 apart
    #[arg(long, value_name = "PORTS", value_delimiter = ',', default_value = "2379,22379,32379")]
    pub base: Vec<u16>,
}

/// Runs the cluster until it is told to stop.
pub async fn run(_args: Args) -> anyhow::Result<()> {
    anyhow::bail!("not built yet")
}
