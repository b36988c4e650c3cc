//! Returns and advantages of one answer from the rewards of its tokens.

/// Computes the discounted sum of rewards from each token on.
pub(crate) fn discounted_returns(rewards: &[f64], gamma: f64) -> Vec<f64> {
    let mut returns = rewards.to_vec();
    for t in (1..returns.len()).rev() {
        returns[t - 1] += gamma * returns[t];
    }
    returns
}

/// Computes undiscounted returns minus the reward of the greedy answer (ReMax, Li et al. 2023).
pub(crate) fn remax_advantages(rewards: &[f64], greedy_reward: f64) -> Vec<f64> {
    discounted_returns(rewards, 1.0).iter().map(|value| value - greedy_reward).collect()
}

/// Computes generalised advantage estimates (Schulman et al. 2015). `values` estimate the return before each token; the
/// value after the last one is 0. The value model's targets are these advantages plus `values`.
pub(crate) fn gae(rewards: &[f64], values: &[f64], gamma: f64, lambda: f64) -> Vec<f64> {
    let mut advantages = vec![0.0; rewards.len()];
    let mut next_value = 0.0;
    let mut next_advantage = 0.0;
    for t in (0..rewards.len()).rev() {
        let surprise = rewards[t] + gamma * next_value - values[t];
        advantages[t] = surprise + gamma * lambda * next_advantage;
        (next_value, next_advantage) = (values[t], advantages[t]);
    }
    advantages
}
