//! Waiting for something to be so in this member's state.

use crate::error::Error;
use crate::kv::State;
use crate::node::Node;

/// Looks at the state, again after each entry that is applied, until `look` finds something; fails when this member stops.
/// `look` holds up applying, so it must be short.
pub(super) async fn until_found<T>(node: &Node, mut look: impl FnMut(&State) -> Option<T>) -> Result<T, Error> {
    let mut applied = node.store().applied();
    loop {
        applied.borrow_and_update();
        if let Some(found) = node.store().read(|s| look(&s.kv)) {
            return Ok(found);
        }
        tokio::select! {
            changed = applied.changed() => changed.map_err(|_| Error::Stopped)?,
            () = node.env().stopping.cancelled() => return Err(Error::Stopped),
            () = node.env().shutdown.cancelled() => return Err(Error::Stopped),
        }
    }
}
