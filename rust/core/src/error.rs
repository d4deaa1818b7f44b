//! Everything that can go wrong in this crate, one variant for each cause.

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// A failure, with what was given and what was expected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// An action is not 0, 1 or 2.
    #[error("plan {row} has action {action} at layer {layer}; expected 0 (skip), 1 (execute) or 2 (repeat)")]
    UnknownAction {
        /// Row of the plan in the batch.
        row: usize,
        /// Layer of the action.
        layer: usize,
        /// The action given.
        action: u8,
    },
    /// A plan in which no layer runs.
    #[error("plan {row} skips all {num_layers} layers; at least one layer must run")]
    EmptyPlan {
        /// Row of the plan in the batch.
        row: usize,
        /// Layers of the plan.
        num_layers: usize,
    },
    /// A sweep of no plans, no prompts or no layers.
    #[error("a sweep needs at least one plan, one prompt and one layer; got {num_plans} plans, {num_examples} prompts, {num_layers} layers")]
    EmptySweep {
        /// Plans given.
        num_plans: usize,
        /// Prompts given.
        num_examples: usize,
        /// Layers of a plan.
        num_layers: usize,
    },
    /// The flat array of plans is not rows times layers.
    #[error("{given} actions were given for {num_plans} plans of {num_layers} layers; give one action for each layer of each plan")]
    PlansLength {
        /// Actions given.
        given: usize,
        /// Plans expected: one for each entry of `example`.
        num_plans: usize,
        /// Layers of a plan.
        num_layers: usize,
    },
    /// A plan belongs to a prompt that is not in the batch.
    #[error("plan {row} belongs to prompt {example}, but the batch has {num_examples} prompts; expected an index below {num_examples}")]
    UnknownExample {
        /// Row of the plan.
        row: usize,
        /// Prompt named.
        example: u32,
        /// Prompts in the batch.
        num_examples: usize,
    },
    /// More rows than a 32-bit index can name.
    #[error("{given} rows are too many for one sweep; split the batch, the limit is {limit}")]
    TooManyRows {
        /// Rows given.
        given: usize,
        /// Largest number allowed.
        limit: usize,
    },
}
