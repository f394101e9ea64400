//! A pause of a whole node: its tasks are not polled until it is over, as under SIGSTOP or a long stop of its virtual machine.
//!
//! Absent: tasks that libraries spawn by themselves (openraft's core, connections). With the network held and the disk behind
//! these tasks, they can do nothing that anybody sees, but their timers run on.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};

use parking_lot::Mutex;

/// Stops and releases tasks. Cloning shares it.
#[derive(Clone, Default)]
pub struct Gate(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    closed: bool,
    waiting: Vec<Waker>,
}

impl Gate {
    pub fn close(&self) {
        self.0.lock().closed = true;
    }

    pub fn open(&self) {
        let waiting = {
            let mut state = self.0.lock();
            state.closed = false;
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Runs `task` whenever the gate is open.
    pub async fn hold<F: Future>(self, task: F) -> F::Output {
        let mut task = pin!(task);
        std::future::poll_fn(|cx| {
            {
                let mut state = self.0.lock();
                if state.closed {
                    state.waiting.push(cx.waker().clone());
                    return Poll::Pending;
                }
            }
            task.as_mut().poll(cx)
        })
        .await
    }
}
