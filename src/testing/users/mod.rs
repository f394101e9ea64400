//! Who uses a cluster, a simulated or a real one: clients, lessees and watchers, all at random, who write down what they are told.
//!
//! Owns their requests and their records, which the checkers judge. How a member is reached is the caller's, who makes the
//! [`Clients`]; what is random comes from an [`Env`] of a seed. Absent: faults and judgement.

mod clients;
mod forwarder;
mod lessees;
mod watchers;

use std::sync::Arc;

use crate::env::Env;
use crate::env::sim::{NoNet, SimDisk};

pub use clients::{Client, Clients, Dialing};
pub use forwarder::Forwarder;
pub use lessees::{Lessee, Stories};
pub use watchers::{Seen, Watcher};

/// What a user takes from the world: time, and random choices of `seed`.
pub fn env(seed: u64) -> Env {
    Env::sim(seed, Arc::new(SimDisk::new(0)), Arc::new(NoNet))
}
