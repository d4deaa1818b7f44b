//! dynadepth-core: plans, the search forest and the sweep planner. Pure Rust: no I/O, no Python, no `unsafe`.
//!
//! * [`Forest`] searches, for each prompt, the plan of highest value. It hands out plans ([`Forest::ask`]) and learns
//!   from their rewards ([`Forest::tell`]).
//! * [`SweepPlan`] says how one pass over the layers of a model evaluates many plans, sharing their common prefixes.
//!
//! Same inputs, same results, bit for bit in one build: no hash map is iterated, ties go to the lowest index, and
//! random numbers come from [`rng::SplitMix64`].

mod climb;
pub mod config;
mod edits;
pub mod error;
mod evaluation;
mod forest;
mod node;
pub mod plan;
mod posterior;
mod prior;
mod probe;
mod results;
pub mod rng;
mod select;
mod spec;
pub mod sweep;
mod tree;

pub use config::{SearchConfig, Selection};
pub use error::{Error, Result};
pub use forest::{AskBatch, Forest};
pub use prior::EditPrior;
pub use results::{BestPlan, Evaluated};
pub use spec::ForestSpec;
pub use sweep::{LayerStep, SweepPlan};
