//! A seeded world for tests.

mod disk;
mod gate;
mod net;
pub mod trace;

pub use disk::SimDisk;
pub use gate::Gate;
pub use net::{Host, SimNet};

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use super::net::{Bound, BoxFuture, Net, Place, Stream};
use super::{Disk, Env, threads};

impl Env {
    /// A simulated world: tasks for threads, and every random choice from `seed`.
    pub fn sim(seed: u64, disk: Arc<dyn Disk>, net: Arc<dyn Net>) -> Self {
        Self::new(disk, net, fastrand::Rng::with_seed(seed), Arc::new(threads::Pools::new()), true)
    }
}

/// A network without a peer.
pub struct NoNet;

impl Net for NoNet {
    fn bind(&self, _: &Place) -> io::Result<Box<dyn Bound>> {
        Err(io::ErrorKind::AddrNotAvailable.into())
    }

    fn resolve(&self, _: String) -> BoxFuture<io::Result<Vec<SocketAddr>>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn connect(&self, _: String) -> BoxFuture<io::Result<Box<dyn Stream>>> {
        Box::pin(async { Err(io::ErrorKind::NetworkUnreachable.into()) })
    }
}
