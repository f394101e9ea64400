//! Waiting for something to be so in this member's state.

use crate::caller::Caller;
use crate::error::Error;
use crate::kv::{State, Wants};
use crate::node::Node;

/// Looks at what `caller` wants of the state, again after each entry that is applied, until `look` finds something; fails when this member stops.
/// `look` holds up applying, so it must be short.
pub(super) async fn until_found<T>(
    node: &Node,
    caller: &Caller,
    wants: Wants<'_>,
    mut look: impl FnMut(&State) -> Option<T>,
) -> Result<T, Error> {
    let mut applied = node.applied();
    loop {
        applied.borrow_and_update();
        if let Some(found) = node.look(caller, wants, &mut look)? {
            return Ok(found);
        }
        tokio::select! {
            changed = applied.changed() => changed.map_err(|_| Error::Stopped)?,
            () = node.env().stopping.cancelled() => return Err(Error::Stopped),
            () = node.env().shutdown.cancelled() => return Err(Error::Stopped),
        }
    }
}
