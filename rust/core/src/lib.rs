//! dynadepth-core: plans, the search forest and the sweep planner. Pure Rust: no I/O, no Python, no `unsafe`.

pub mod error;
pub mod plan;
pub mod sweep;

pub use error::{Error, Result};
pub use sweep::{LayerStep, SweepPlan};
