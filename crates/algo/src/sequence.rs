use crate::ObjectiveError;

/// What every rank knows of an answer before anything is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SequenceInfo {
    /// The group it belongs to; members of a group may sit anywhere in a slice.
    pub group: u64,
    /// The verifiable outcome, in `[0, 1]`: what PACS trains on.
    pub label: f64,
    /// The reward: what every other objective trains on.
    pub reward: f64,
    /// Reward of the greedy answer to the same prompt; ReMax alone reads it.
    pub greedy_reward: Option<f64>,
    /// How many tokens count, above 0.
    pub tokens: u32,
    /// The answer ended at the length limit.
    pub truncated: bool,
}

/// Numbers of the tokens of one answer, each slice as long as [`SequenceInfo::tokens`].
///
/// There is no padding and no mask: a token that does not count is not passed, so it cannot influence anything.
/// Log-probs are in nats, at the temperature that the answer was sampled with.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenData<'a> {
    /// Log-probs under the policy being trained, now. Only an update reads them, the start of a step does not.
    pub new: &'a [f64],
    /// Log-probs by the learner under the policy that the ratio compares with: the one at the start of the step. For
    /// PACS the one at the last reference reset.
    pub old: &'a [f64],
    /// Log-probs of the distribution that the tokens were drawn from, as the rollout engine computed them; importance
    /// weights read them. With top-k, top-p or min-p they lie above those of the temperature-scaled policy.
    pub rollout: Option<&'a [f64]>,
    /// Log-probs under the frozen reference policy; a KL penalty reads them.
    pub reference: Option<&'a [f64]>,
    /// Entropies of the policy being trained, now; only the value of an entropy bonus reads them.
    pub entropies: Option<&'a [f64]>,
    /// Estimates of the value model at the start of the step: of the return before each token.
    pub values: Option<&'a [f64]>,
    /// Estimates of the value model now.
    pub new_values: Option<&'a [f64]>,
}

/// An answer as objectives see it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer<'a> {
    /// What every rank knows.
    pub info: SequenceInfo,
    /// What the rank knows that computes it.
    pub tokens: TokenData<'a>,
}

/// An answer with its position in the caller's slice, which errors name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed<'a> {
    pub(crate) index: usize,
    pub(crate) info: &'a SequenceInfo,
    pub(crate) tokens: &'a TokenData<'a>,
}

impl<'a> Placed<'a> {
    pub(crate) fn new(index: usize, info: &'a SequenceInfo, tokens: &'a TokenData<'a>) -> Self {
        Self { index, info, tokens }
    }

    pub(crate) fn new_logprobs(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("log-probs of the policy being trained", Some(self.tokens.new))
    }

    pub(crate) fn old_logprobs(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("old log-probs", Some(self.tokens.old))
    }

    pub(crate) fn rollout_logprobs(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("log-probs of the rollout engine", self.tokens.rollout)
    }

    pub(crate) fn reference_logprobs(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("log-probs of the reference policy", self.tokens.reference)
    }

    pub(crate) fn entropies(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("entropies", self.tokens.entropies)
    }

    pub(crate) fn values(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("values", self.tokens.values)
    }

    pub(crate) fn new_values(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("new values", self.tokens.new_values)
    }

    /// The numbers that were asked for: there, as many as there are tokens, and finite.
    pub(crate) fn checked(self, what: &'static str, values: Option<&'a [f64]>) -> Result<&'a [f64], ObjectiveError> {
        let (index, group, tokens) = (self.index, self.info.group, self.info.tokens as usize);
        let values = values.unwrap_or_default();
        if values.len() != tokens {
            return Err(ObjectiveError::Tokens { index, group, what, tokens, values: values.len() });
        }
        match values.iter().position(|value| !value.is_finite()) {
            Some(token) => Err(ObjectiveError::NotFinite { index, group, what, token, value: values[token] }),
            None => Ok(values),
        }
    }
}

/// Checks what every objective asks of its answers.
pub(crate) fn check_infos(infos: &[SequenceInfo]) -> Result<(), ObjectiveError> {
    if infos.is_empty() {
        return Err(ObjectiveError::NoSequences);
    }
    for (index, &SequenceInfo { group, reward, tokens, .. }) in infos.iter().enumerate() {
        if tokens == 0 {
            return Err(ObjectiveError::EmptyAnswer { index, group });
        }
        if !reward.is_finite() {
            return Err(ObjectiveError::Reward { index, group, reward });
        }
    }
    Ok(())
}
